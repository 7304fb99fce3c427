"""Pruned GPT-NeoX models (`pruned_layers.py`)."""

from typing import Any

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedGPTNeoXConfig(PrunedConfigMixin, GPTNeoXConfig):
    """Config of a pruned GPT-NeoX."""

    model_type = "pruned_gpt_neox"


class PrunedGPTNeoXMixin(PrunedModelMixin):
    """The parts of a pruned GPT-NeoX that differ from Llama's."""

    config_class: Any = PrunedGPTNeoXConfig
    attention_names = LinearNames("attention", ("query_key_value",), "dense")
    mlp_names = LinearNames("mlp", ("dense_h_to_4h",), "dense_4h_to_h")


class PrunedGPTNeoXModel(PrunedGPTNeoXMixin, GPTNeoXModel):
    """A pruned GPT-NeoX, without the head."""


class PrunedGPTNeoXForCausalLM(PrunedGPTNeoXMixin, GPTNeoXForCausalLM):
    """A pruned GPT-NeoX."""
