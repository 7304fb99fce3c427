"""Pruned SmolLM3 models (`pruned_layers.py`)."""

from transformers import SmolLM3Config, SmolLM3ForCausalLM

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedSmolLM3Config(PrunedConfigMixin, SmolLM3Config):
    """Config of a pruned SmolLM3."""

    model_type = "pruned_smollm3"


class PrunedSmolLM3ForCausalLM(PrunedModelMixin, SmolLM3ForCausalLM):
    """A pruned SmolLM3."""

    config_class = PrunedSmolLM3Config
