"""Pruned OPT models (`pruned_layers.py`)."""

from typing import Any

from transformers import OPTConfig, OPTForCausalLM, OPTModel

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedOPTConfig(PrunedConfigMixin, OPTConfig):
    """Config of a pruned OPT."""

    model_type = "pruned_opt"
    intermediate_size_name = "ffn_dim"


class PrunedOPTMixin(PrunedModelMixin):
    """The parts of a pruned OPT that differ from Llama's."""

    config_class: Any = PrunedOPTConfig
    layers_path = "decoder.layers"
    attention_names = LinearNames("self_attn", ("q_proj", "k_proj", "v_proj"), "out_proj")
    mlp_names = LinearNames("", ("fc1",), "fc2")


class PrunedOPTModel(PrunedOPTMixin, OPTModel):
    """A pruned OPT, without the head."""


class PrunedOPTForCausalLM(PrunedOPTMixin, OPTForCausalLM):
    """A pruned OPT."""
