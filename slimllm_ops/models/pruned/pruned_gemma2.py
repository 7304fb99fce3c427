"""Pruned Gemma 2 models (`pruned_layers.py`)."""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedGemma2Config(PrunedConfigMixin, Gemma2Config):
    """Config of a pruned Gemma 2."""

    model_type = "pruned_gemma2"


class PrunedGemma2Model(PrunedModelMixin, Gemma2Model):
    """A pruned Gemma 2, without the head."""

    config_class = PrunedGemma2Config


class PrunedGemma2ForCausalLM(PrunedModelMixin, Gemma2ForCausalLM):
    """A pruned Gemma 2."""

    config_class = PrunedGemma2Config
