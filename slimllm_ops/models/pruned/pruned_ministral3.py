"""Pruned Ministral 3 models (`pruned_layers.py`)."""

from transformers import Ministral3Config, Ministral3ForCausalLM, Ministral3Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedMinistral3Config(PrunedConfigMixin, Ministral3Config):
    """Config of a pruned Ministral 3."""

    model_type = "pruned_ministral3"


class PrunedMinistral3Model(PrunedModelMixin, Ministral3Model):
    """A pruned Ministral 3, without the head."""

    config_class = PrunedMinistral3Config


class PrunedMinistral3ForCausalLM(PrunedModelMixin, Ministral3ForCausalLM):
    """A pruned Ministral 3."""

    config_class = PrunedMinistral3Config
