"""Pruned OLMo 2 models (`pruned_layers.py`)."""

from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedOlmo2Config(PrunedConfigMixin, Olmo2Config):
    """Config of a pruned OLMo 2."""

    model_type = "pruned_olmo2"


class PrunedOlmo2Model(PrunedModelMixin, Olmo2Model):
    """A pruned OLMo 2, without the head."""

    config_class = PrunedOlmo2Config


class PrunedOlmo2ForCausalLM(PrunedModelMixin, Olmo2ForCausalLM):
    """A pruned OLMo 2."""

    config_class = PrunedOlmo2Config
