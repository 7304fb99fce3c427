"""Pruned Qwen3 models (`pruned_layers.py`)."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedQwen3Config(PrunedConfigMixin, Qwen3Config):
    """Config of a pruned Qwen3."""

    model_type = "pruned_qwen3"


class PrunedQwen3Model(PrunedModelMixin, Qwen3Model):
    """A pruned Qwen3, without the head."""

    config_class = PrunedQwen3Config


class PrunedQwen3ForCausalLM(PrunedModelMixin, Qwen3ForCausalLM):
    """A pruned Qwen3."""

    config_class = PrunedQwen3Config
