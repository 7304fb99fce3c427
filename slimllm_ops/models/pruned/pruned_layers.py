"""Pruned models: the stock transformers classes with fewer heads and channels, set for each layer.

Every pruned checkpoint contains a copy of this file and of its family's file, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` needs only torch and transformers. This is why the
families' files use a relative import, which transformers follows.

The config keeps the dense model's global numbers and adds:

    num_attention_heads_per_layer, num_key_value_heads_per_layer, intermediate_size_per_layer
    attention_output_bias_per_layer, mlp_output_bias_per_layer      whether the output projections have a bias

In a mixture of experts, `intermediate_size_per_layer` is the number of channels in each of a layer's experts.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import nn

# The attention by which vLLM builds a model.
VLLM = "vllm"
# Grouped matrix products on a GPU need rows of whole 16 bytes: this many channels of two bytes each.
WHOLE_CHANNELS = 8


class LinearNames(NamedTuple):
    """The linear maps of one branch of a decoder layer: the module ("" for the layer itself), and their names in it."""

    module: str
    inputs: tuple[str, ...]
    output: str


class PrunedConfigMixin:
    """The per-layer settings added to the stock config; without them, the shapes are the dense model's.

    From these settings, `per_layer_config` gives the config of each layer. Transformers sizes its caches by it, and
    vLLM its layers.
    """

    intermediate_size_name = "intermediate_size"
    num_attention_heads_per_layer: list[int] | None = None
    num_key_value_heads_per_layer: list[int] | None = None
    intermediate_size_per_layer: list[int] | None = None
    attention_output_bias_per_layer: list[bool] | None = None
    mlp_output_bias_per_layer: list[bool] | None = None

    def __post_init__(self: Any, **settings: Any) -> None:
        # The lists below say the same.
        settings.pop("per_layer_config", None)
        super().__post_init__(**settings)  # type: ignore[misc]
        if self.num_attention_heads_per_layer is not None and hasattr(self, "is_heterogeneous"):
            self.per_layer_config = self._layer_sizes()
            # Transformers refuses to read a number of the whole model that differs between layers. Stock constructors
            # read these numbers, and the mixin below resizes what they build.
            self.per_layer_attributes.clear()

    def _layer_sizes(self: Any) -> dict[int, dict[str, int]]:
        """Return the sizes of each layer, by the names of the whole model's sizes."""
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        sizes = zip(
            self.num_attention_heads_per_layer,
            self.num_key_value_heads_per_layer,
            self.intermediate_size_per_layer,
            strict=True,
        )
        return {
            layer: {
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                self.intermediate_size_name: channels,
                # Without it, it would be computed from the layer's heads.
                "head_dim": head_dim,
            }
            for layer, (heads, kv_heads, channels) in enumerate(sizes)
        }

    def to_dict(self: Any) -> dict[str, Any]:
        """Return the settings, without `per_layer_config`."""
        return _without_layers(super().to_dict())  # type: ignore[misc]

    def to_diff_dict(self: Any) -> dict[str, Any]:
        """Return the settings that differ from the defaults, without `per_layer_config`."""
        return _without_layers(super().to_diff_dict())  # type: ignore[misc]


class PrunedModelMixin:
    """A model whose layers are resized after the stock constructor builds them; every forward is the stock one.

    It serves the causal language model and the base model (`LlamaForCausalLM` and `LlamaModel`): `layers_path` is
    relative to the base model. A family whose names differ from Llama's sets them in its class.
    """

    config: Any
    config_class: Any
    layers_path = "layers"
    attention_names = LinearNames("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj")
    mlp_names = LinearNames("mlp", ("gate_proj", "up_proj"), "down_proj")

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        pruned = config.num_attention_heads_per_layer is not None
        if pruned:
            require_sizes_per_layer(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not pruned:
            return
        layers: Any = self.base_model.get_submodule(self.layers_path)  # type: ignore[attr-defined]
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
    vllm_experts_size = "moe_intermediate_size"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        channels = config.intermediate_size_per_layer or []
        # Unless the user chooses, transformers uses grouped products, which restrict the number of channels.
        if config._experts_implementation is None and any(number % WHOLE_CHANNELS for number in channels):
            config._experts_implementation = "eager"
        serves = config._attn_implementation == VLLM
        if serves and channels:
            # A number again, if a model was built from this config before.
            vars(config)[self.vllm_experts_size] = max(channels)
        super().__init__(config, *args, **kwargs)
        if serves and channels:
            # vLLM builds experts of its own, whose size it reads here: a list has a number for each layer. A single
            # number would leave a part of each weight as it is in memory. The config's checks take no list.
            vars(config)[self.vllm_experts_size] = list(channels)

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


def require_sizes_per_layer(config: Any) -> None:
    """Check that vLLM, if it builds the model, sizes every layer by its own heads.

    Raises:
        RuntimeError: This vLLM sizes all layers alike, which can give wrong text without an error.
    """
    if config._attn_implementation != VLLM:
        return
    # Transformers refuses a model file that imports a package that is not installed.
    sizes = importlib.import_module("vllm.config.model_arch").ModelArchitectureConfig
    if not (hasattr(sizes, "from_layers") and getattr(config, "is_heterogeneous", False)):
        raise RuntimeError(
            "the layers of this pruned model have their own numbers of heads, which needs vllm>=0.28 and "
            "transformers>=5.14: upgrade both, or prune with --uniform and serve the export to a stock class"
        )


def _without_layers(settings: dict[str, Any]) -> dict[str, Any]:
    settings.pop("per_layer_config", None)
    return settings


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
