"""Pruned GPT-NeoX models (`pruned_layers.py`)."""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedGPTNeoXConfig(PrunedConfigMixin, GPTNeoXConfig):
    """Config of a pruned GPT-NeoX."""

    model_type = "pruned_gpt_neox"


class PrunedGPTNeoXForCausalLM(PrunedModelMixin, GPTNeoXForCausalLM):
    """A pruned GPT-NeoX."""

    config_class = PrunedGPTNeoXConfig
    layers_path = "gpt_neox.layers"
    attention_names = LinearNames("attention", ("query_key_value",), "dense")
    mlp_names = LinearNames("mlp", ("dense_h_to_4h",), "dense_4h_to_h")
