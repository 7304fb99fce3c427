"""Pruned SmolLM3 models (`pruned_layers.py`)."""

from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedSmolLM3Config(PrunedConfigMixin, SmolLM3Config):
    """Config of a pruned SmolLM3."""

    model_type = "pruned_smollm3"


class PrunedSmolLM3Model(PrunedModelMixin, SmolLM3Model):
    """A pruned SmolLM3, without the head."""

    config_class = PrunedSmolLM3Config


class PrunedSmolLM3ForCausalLM(PrunedModelMixin, SmolLM3ForCausalLM):
    """A pruned SmolLM3."""

    config_class = PrunedSmolLM3Config
