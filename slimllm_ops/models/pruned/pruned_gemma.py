"""Pruned Gemma models (`pruned_layers.py`)."""

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedGemmaConfig(PrunedConfigMixin, GemmaConfig):
    """Config of a pruned Gemma."""

    model_type = "pruned_gemma"


class PrunedGemmaModel(PrunedModelMixin, GemmaModel):
    """A pruned Gemma, without the head."""

    config_class = PrunedGemmaConfig


class PrunedGemmaForCausalLM(PrunedModelMixin, GemmaForCausalLM):
    """A pruned Gemma."""

    config_class = PrunedGemmaConfig
