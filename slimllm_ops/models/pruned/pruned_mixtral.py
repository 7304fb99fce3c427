"""Pruned Mixtral models (`pruned_layers.py`)."""

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from .pruned_layers import PrunedConfigMixin, PrunedExpertsMixin


class PrunedMixtralConfig(PrunedConfigMixin, MixtralConfig):
    """Config of a pruned Mixtral."""

    model_type = "pruned_mixtral"


class PrunedMixtralModel(PrunedExpertsMixin, MixtralModel):
    """A pruned Mixtral, without the head."""

    config_class = PrunedMixtralConfig


class PrunedMixtralForCausalLM(PrunedExpertsMixin, MixtralForCausalLM):
    """A pruned Mixtral."""

    config_class = PrunedMixtralConfig
