"""Pruned Mistral models (`pruned_layers.py`)."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedMistralConfig(PrunedConfigMixin, MistralConfig):
    """Config of a pruned Mistral."""

    model_type = "pruned_mistral"


class PrunedMistralModel(PrunedModelMixin, MistralModel):
    """A pruned Mistral, without the head."""

    config_class = PrunedMistralConfig


class PrunedMistralForCausalLM(PrunedModelMixin, MistralForCausalLM):
    """A pruned Mistral."""

    config_class = PrunedMistralConfig
