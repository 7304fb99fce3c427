"""Pruned EXAONE 4 models (`pruned_layers.py`)."""

from transformers import Exaone4Config, Exaone4ForCausalLM, Exaone4Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedExaone4Config(PrunedConfigMixin, Exaone4Config):
    """Config of a pruned EXAONE 4."""

    model_type = "pruned_exaone4"


class PrunedExaone4Model(PrunedModelMixin, Exaone4Model):
    """A pruned EXAONE 4, without the head."""

    config_class = PrunedExaone4Config


class PrunedExaone4ForCausalLM(PrunedModelMixin, Exaone4ForCausalLM):
    """A pruned EXAONE 4."""

    config_class = PrunedExaone4Config
