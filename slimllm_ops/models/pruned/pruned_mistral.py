"""Pruned Mistral models (`pruned_layers.py`)."""

from transformers import MistralConfig, MistralForCausalLM

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedMistralConfig(PrunedConfigMixin, MistralConfig):
    """Config of a pruned Mistral."""

    model_type = "pruned_mistral"


class PrunedMistralForCausalLM(PrunedModelMixin, MistralForCausalLM):
    """A pruned Mistral."""

    config_class = PrunedMistralConfig
