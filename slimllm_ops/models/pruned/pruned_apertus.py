"""Pruned Apertus models (`pruned_layers.py`)."""

from typing import Any

from transformers import ApertusConfig, ApertusForCausalLM, ApertusModel

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedApertusConfig(PrunedConfigMixin, ApertusConfig):
    """Config of a pruned Apertus."""

    model_type = "pruned_apertus"


class PrunedApertusMixin(PrunedModelMixin):
    """The parts of a pruned Apertus that differ from Llama's."""

    config_class: Any = PrunedApertusConfig
    mlp_names = LinearNames("mlp", ("up_proj",), "down_proj")


class PrunedApertusModel(PrunedApertusMixin, ApertusModel):
    """A pruned Apertus, without the head."""


class PrunedApertusForCausalLM(PrunedApertusMixin, ApertusForCausalLM):
    """A pruned Apertus."""
