"""Pruned StarCoder2 models (`pruned_layers.py`)."""

from typing import Any

from transformers import Starcoder2Config, Starcoder2ForCausalLM, Starcoder2Model

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedStarcoder2Config(PrunedConfigMixin, Starcoder2Config):
    """Config of a pruned StarCoder2."""

    model_type = "pruned_starcoder2"


class PrunedStarcoder2Mixin(PrunedModelMixin):
    """The parts of a pruned StarCoder2 that differ from Llama's."""

    config_class: Any = PrunedStarcoder2Config
    mlp_names = LinearNames("mlp", ("c_fc",), "c_proj")


class PrunedStarcoder2Model(PrunedStarcoder2Mixin, Starcoder2Model):
    """A pruned StarCoder2, without the head."""


class PrunedStarcoder2ForCausalLM(PrunedStarcoder2Mixin, Starcoder2ForCausalLM):
    """A pruned StarCoder2."""
