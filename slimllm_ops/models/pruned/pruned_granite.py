"""Pruned Granite models (`pruned_layers.py`)."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedGraniteConfig(PrunedConfigMixin, GraniteConfig):
    """Config of a pruned Granite."""

    model_type = "pruned_granite"


class PrunedGraniteModel(PrunedModelMixin, GraniteModel):
    """A pruned Granite, without the head."""

    config_class = PrunedGraniteConfig


class PrunedGraniteForCausalLM(PrunedModelMixin, GraniteForCausalLM):
    """A pruned Granite."""

    config_class = PrunedGraniteConfig
