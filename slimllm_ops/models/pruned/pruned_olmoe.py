"""Pruned OLMoE models (`pruned_layers.py`)."""

from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

from .pruned_layers import PrunedConfigMixin, PrunedExpertsMixin


class PrunedOlmoeConfig(PrunedConfigMixin, OlmoeConfig):
    """Config of a pruned OLMoE."""

    model_type = "pruned_olmoe"


class PrunedOlmoeModel(PrunedExpertsMixin, OlmoeModel):
    """A pruned OLMoE, without the head."""

    config_class = PrunedOlmoeConfig


class PrunedOlmoeForCausalLM(PrunedExpertsMixin, OlmoeForCausalLM):
    """A pruned OLMoE."""

    config_class = PrunedOlmoeConfig
