"""Pruned OLMo 3 models (`pruned_layers.py`)."""

from transformers import Olmo3Config, Olmo3ForCausalLM, Olmo3Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedOlmo3Config(PrunedConfigMixin, Olmo3Config):
    """Config of a pruned OLMo 3."""

    model_type = "pruned_olmo3"


class PrunedOlmo3Model(PrunedModelMixin, Olmo3Model):
    """A pruned OLMo 3, without the head."""

    config_class = PrunedOlmo3Config


class PrunedOlmo3ForCausalLM(PrunedModelMixin, Olmo3ForCausalLM):
    """A pruned OLMo 3."""

    config_class = PrunedOlmo3Config
