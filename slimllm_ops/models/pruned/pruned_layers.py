"""Pruned models: the stock transformers classes with fewer heads and channels, set for each layer.

Every pruned checkpoint contains a copy of this file and of its family's file, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` needs only torch and transformers. This is why the
families' files use a relative import, which transformers follows.

The config keeps the dense model's global numbers and adds:

    num_attention_heads_per_layer, num_key_value_heads_per_layer, intermediate_size_per_layer
    attention_output_bias_per_layer, mlp_output_bias_per_layer      whether the output projections have a bias

In a mixture of experts, `intermediate_size_per_layer` is the number of channels in each of a layer's experts.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import nn

# Grouped matrix products on a GPU need rows of whole 16 bytes: this many channels of two bytes each.
WHOLE_CHANNELS = 8


class LinearNames(NamedTuple):
    """The linear maps of one branch of a decoder layer: the module ("" for the layer itself), and their names in it."""

    module: str
    inputs: tuple[str, ...]
    output: str


class LayerConfigs(Sequence[Any]):
    """The config of each layer, with the layer's own heads; transformers sizes its caches by these."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __len__(self) -> int:
        return int(self._config.num_hidden_layers)

    def __getitem__(self, which: Any) -> Any:
        """Return the config of a layer, of several by a slice, or of a kind of layers, which does not differ in it."""
        heads = self._config.num_attention_heads_per_layer
        if isinstance(which, slice):
            return [self[layer] for layer in range(*which.indices(len(self)))]
        if isinstance(which, str) or heads is None:
            return self._config
        layer = copy(self._config)
        layer.head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        layer.num_attention_heads = heads[which]
        layer.num_key_value_heads = self._config.num_key_value_heads_per_layer[which]
        return layer


class PrunedConfigMixin:
    """The per-layer settings added to the stock config; without them, the shapes are the dense model's."""

    num_attention_heads_per_layer: list[int] | None = None
    num_key_value_heads_per_layer: list[int] | None = None
    intermediate_size_per_layer: list[int] | None = None
    attention_output_bias_per_layer: list[bool] | None = None
    mlp_output_bias_per_layer: list[bool] | None = None

    @property
    def per_layer_config(self) -> Any:
        """The config of each layer (`LayerConfigs`)."""
        return LayerConfigs(self)

    @per_layer_config.setter
    def per_layer_config(self, settings: Any) -> None:
        raise ValueError("the layers of a pruned model differ by its lists with a number for each layer")


class PrunedModelMixin:
    """A model whose layers are resized after the stock constructor builds them; every forward is the stock one.

    A family whose names differ from Llama's sets them in its class.
    """

    config: Any
    config_class: Any
    layers_path = "model.layers"
    attention_names = LinearNames("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj")
    mlp_names = LinearNames("mlp", ("gate_proj", "up_proj"), "down_proj")

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if config.num_attention_heads_per_layer is None:
            return
        layers: Any = self.get_submodule(self.layers_path)  # type: ignore[attr-defined]
        for index, layer in enumerate(layers):
            self.resize_attention(layer.get_submodule(self.attention_names.module), config, index)
            self.resize_mlp(layer.get_submodule(self.mlp_names.module), config, index)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Return transformers' manager of batches, unless the layers differ in heads.

        Raises:
            NotImplementedError: Its paged cache has the same number of key/value heads in all layers.
        """
        heads = self.config.num_key_value_heads_per_layer
        whole = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        if heads is not None and set(heads) != {whole}:
            raise NotImplementedError(
                f"generate_batch keeps {whole} key/value heads for every layer, and the layers of this model have "
                f"{min(heads)} to {max(heads)}: use generate()"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def resize_attention(self, attention: Any, config: Any, index: int) -> None:
        """Set the number of heads of a layer's attention; each key/value head keeps its query heads."""
        heads = config.num_attention_heads_per_layer[index]
        bias = config.attention_output_bias_per_layer[index]
        _resize(attention, self.attention_names, heads, config.num_attention_heads, bias)
        sizes = {"num_heads": heads, "num_key_value_heads": config.num_key_value_heads_per_layer[index]}
        for name, value in sizes.items():
            if hasattr(attention, name):
                setattr(attention, name, value)

    def resize_mlp(self, mlp: Any, config: Any, index: int) -> None:
        """Set the number of channels of a layer's MLP."""
        channels = config.intermediate_size_per_layer[index]
        whole = getattr(mlp, self.mlp_names.output).in_features
        _resize(mlp, self.mlp_names, channels, whole, config.mlp_output_bias_per_layer[index])
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = channels


class PrunedExpertsMixin(PrunedModelMixin):
    """A pruned mixture of experts, whose expert weights are three-dimensional parameters."""

    mlp_names = LinearNames("mlp.experts", ("gate_up_proj",), "down_proj")

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        channels = config.intermediate_size_per_layer or []
        # Unless the user chooses, transformers uses grouped products, which restrict the number of channels.
        if config._experts_implementation is None and any(number % WHOLE_CHANNELS for number in channels):
            config._experts_implementation = "eager"
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The experts belong to the stock class; transformers would look for them in this file and not find them.
        return True

    def resize_mlp(self, mlp: Any, config: Any, index: int) -> None:
        """Set the number of channels of every expert in a layer."""
        channels = config.intermediate_size_per_layer[index]
        mlp.gate_up_proj = nn.Parameter(mlp.gate_up_proj.detach()[:, : 2 * channels].clone())
        mlp.down_proj = nn.Parameter(
            mlp.down_proj.detach()[:, :, :channels].clone(memory_format=torch.contiguous_format)
        )
        mlp.intermediate_dim = channels


def _resize(module: nn.Module, names: LinearNames, kept: int, whole: int, output_bias: bool) -> None:
    """Shrink the linear maps of a branch to the share of their rows and columns that the kept units own."""
    for name in names.inputs:
        old = getattr(module, name)
        setattr(module, name, _like(old, old.in_features, old.out_features * kept // whole, old.bias is not None))
    old = getattr(module, names.output)
    setattr(module, names.output, _like(old, old.in_features * kept // whole, old.out_features, output_bias))


def _like(old: nn.Linear, in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Return a new Linear with another shape, on the same device and with the same dtype."""
    return nn.Linear(in_features, out_features, bias=bias, device=old.weight.device, dtype=old.weight.dtype)
