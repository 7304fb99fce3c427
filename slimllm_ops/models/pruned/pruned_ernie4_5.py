"""Pruned ERNIE 4.5 models (`pruned_layers.py`)."""

from transformers import Ernie4_5Config, Ernie4_5ForCausalLM, Ernie4_5Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedErnie4_5Config(PrunedConfigMixin, Ernie4_5Config):
    """Config of a pruned ERNIE 4.5."""

    model_type = "pruned_ernie4_5"


class PrunedErnie4_5Model(PrunedModelMixin, Ernie4_5Model):
    """A pruned ERNIE 4.5, without the head."""

    config_class = PrunedErnie4_5Config


class PrunedErnie4_5ForCausalLM(PrunedModelMixin, Ernie4_5ForCausalLM):
    """A pruned ERNIE 4.5."""

    config_class = PrunedErnie4_5Config
