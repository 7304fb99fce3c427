"""Pruned OPT models (`pruned_layers.py`)."""

from transformers import OPTConfig, OPTForCausalLM

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedOPTConfig(PrunedConfigMixin, OPTConfig):
    """Config of a pruned OPT."""

    model_type = "pruned_opt"


class PrunedOPTForCausalLM(PrunedModelMixin, OPTForCausalLM):
    """A pruned OPT."""

    config_class = PrunedOPTConfig
    layers_path = "model.decoder.layers"
    attention_names = LinearNames("self_attn", ("q_proj", "k_proj", "v_proj"), "out_proj")
    mlp_names = LinearNames("", ("fc1",), "fc2")
