"""Pruned models: the stock transformers classes with fewer heads and channels, a number for each layer.

This file is self-contained: a copy of it lies in every pruned checkpoint, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` needs torch and transformers only.

A family is two classes of two lines each, at the end. The config keeps the dense model's global numbers and adds:

    num_attention_heads_per_layer, num_key_value_heads_per_layer, intermediate_size_per_layer
    attention_output_bias_per_layer, mlp_output_bias_per_layer      what recovery added to o_proj and down_proj
"""

from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

# How the shape of each projection follows from a layer's numbers.
QUERIES = ("q_proj",)
KEYS_VALUES = ("k_proj", "v_proj")
ATTENTION_OUTPUT = "o_proj"
MLP_INPUTS = ("gate_proj", "up_proj")
MLP_OUTPUT = "down_proj"


class PrunedConfigMixin:
    """The numbers of each layer, beside the stock config. Empty lists stand for the dense model's shapes."""

    num_attention_heads_per_layer: list[int] | None = None
    num_key_value_heads_per_layer: list[int] | None = None
    intermediate_size_per_layer: list[int] | None = None
    attention_output_bias_per_layer: list[bool] | None = None
    mlp_output_bias_per_layer: list[bool] | None = None


class PrunedModelMixin:
    """Resizes the layers that the stock constructor built; every forward is the stock one."""

    model: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if config.num_attention_heads_per_layer is None:
            return
        for index, layer in enumerate(self.model.layers):
            _resize_attention(layer.self_attn, config, index)
            _resize_mlp(layer.mlp, config, index)


def _resize_attention(attention: Any, config: Any, index: int) -> None:
    heads = config.num_attention_heads_per_layer[index]
    kv_heads = config.num_key_value_heads_per_layer[index]
    width = heads * attention.head_dim
    for name in QUERIES:
        _resize(attention, name, out_features=width)
    for name in KEYS_VALUES:
        _resize(attention, name, out_features=kv_heads * attention.head_dim)
    _resize(attention, ATTENTION_OUTPUT, in_features=width, bias=config.attention_output_bias_per_layer[index])
    sizes = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
    }
    for name, value in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def _resize_mlp(mlp: Any, config: Any, index: int) -> None:
    channels = config.intermediate_size_per_layer[index]
    for name in MLP_INPUTS:
        _resize(mlp, name, out_features=channels)
    _resize(mlp, MLP_OUTPUT, in_features=channels, bias=config.mlp_output_bias_per_layer[index])
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = channels


def _resize(
    module: nn.Module,
    name: str,
    in_features: int | None = None,
    out_features: int | None = None,
    bias: bool | None = None,
) -> None:
    """Replace a Linear by one of another shape, on the same device and of the same dtype."""
    old = getattr(module, name)
    new = nn.Linear(
        in_features or old.in_features,
        out_features or old.out_features,
        bias=(old.bias is not None) if bias is None else bias,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    setattr(module, name, new)


class PrunedLlamaConfig(PrunedConfigMixin, LlamaConfig):
    """Config of a pruned Llama."""

    model_type = "pruned_llama"


class PrunedLlamaForCausalLM(PrunedModelMixin, LlamaForCausalLM):
    """A pruned Llama."""

    config_class = PrunedLlamaConfig


PRUNED_MODELS = ((PrunedLlamaConfig, PrunedLlamaForCausalLM),)

for _config, _model in PRUNED_MODELS:
    # `save_pretrained` of a loaded model then copies this file again and names it in the config's `auto_map`.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")
