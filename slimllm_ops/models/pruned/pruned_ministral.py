"""Pruned Ministral models (`pruned_layers.py`)."""

from transformers import MinistralConfig, MinistralForCausalLM, MinistralModel

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedMinistralConfig(PrunedConfigMixin, MinistralConfig):
    """Config of a pruned Ministral."""

    model_type = "pruned_ministral"


class PrunedMinistralModel(PrunedModelMixin, MinistralModel):
    """A pruned Ministral, without the head."""

    config_class = PrunedMinistralConfig


class PrunedMinistralForCausalLM(PrunedModelMixin, MinistralForCausalLM):
    """A pruned Ministral."""

    config_class = PrunedMinistralConfig
