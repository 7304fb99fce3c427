"""Pruned Qwen2 models (`pruned_layers.py`)."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedQwen2Config(PrunedConfigMixin, Qwen2Config):
    """Config of a pruned Qwen2."""

    model_type = "pruned_qwen2"


class PrunedQwen2Model(PrunedModelMixin, Qwen2Model):
    """A pruned Qwen2, without the head."""

    config_class = PrunedQwen2Config


class PrunedQwen2ForCausalLM(PrunedModelMixin, Qwen2ForCausalLM):
    """A pruned Qwen2."""

    config_class = PrunedQwen2Config
