"""Pruned StarCoder2 models (`pruned_layers.py`)."""

from transformers import Starcoder2Config, Starcoder2ForCausalLM

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedStarcoder2Config(PrunedConfigMixin, Starcoder2Config):
    """Config of a pruned StarCoder2."""

    model_type = "pruned_starcoder2"


class PrunedStarcoder2ForCausalLM(PrunedModelMixin, Starcoder2ForCausalLM):
    """A pruned StarCoder2."""

    config_class = PrunedStarcoder2Config
    mlp_names = LinearNames("mlp", ("c_fc",), "c_proj")
