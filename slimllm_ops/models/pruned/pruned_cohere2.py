"""Pruned Cohere 2 models (`pruned_layers.py`)."""

from transformers import Cohere2Config, Cohere2ForCausalLM, Cohere2Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedCohere2Config(PrunedConfigMixin, Cohere2Config):
    """Config of a pruned Cohere 2."""

    model_type = "pruned_cohere2"


class PrunedCohere2Model(PrunedModelMixin, Cohere2Model):
    """A pruned Cohere 2, without the head."""

    config_class = PrunedCohere2Config


class PrunedCohere2ForCausalLM(PrunedModelMixin, Cohere2ForCausalLM):
    """A pruned Cohere 2."""

    config_class = PrunedCohere2Config
