"""Model families as a table: how each names its parts. A family of the same build is one more row.

A row describes decoder layers whose residual stream passes two branches:

    h = h + multiplier * output_norm(output_projection(attention(norm(h))))
    h = h + multiplier * output_norm(output_projection(mlp(norm(h))))

where most families have no norm of the output and no multiplier, some none of the input, and in a parallel layer the
MLP reads what the attention reads. A branch consists of units (KV groups; channels). The rows of every projection into
it, and the columns of its output projection, lie unit by unit, so that nothing more need be known to take units out.
Where several projections are stored as one, its parts lie one after the other, and within each the units.

The MLP of a mixture of experts is many such branches, of which each token passes a few. Their weights are one tensor
each for all experts, (E, rows, columns): so each expert keeps as many channels as the others, though not the same ones.
A unit is a channel of one expert, and the experts' channels follow each other: unit e I + c is channel c of expert e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.models.pair import Pair
from slimllm_ops.models.pruned.pruned_layers import LinearNames, PrunedExpertsMixin, PrunedModelMixin
from slimllm_ops.models.tensor_layout import Stored

# The table is read by processes that only solve: they need none of transformers, which takes seconds to import.
if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The package of the pruned classes, a file for each family.
PRUNED_CLASSES = "slimllm_ops.models.pruned"


def unit_rows(units: Sequence[int], num_units: int, num_rows: int) -> Tensor:
    """Return the rows of some units, where each of `num_units` has an equal share of `num_rows`, side by side."""
    width = num_rows // num_units
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What makes an MLP one of many, and who chooses among them.

    Attributes:
        router: the module that gives every token (N, D) its experts: logits, weights (N, k), and which they are (N, k).
        activation: what follows the gate, a module of the experts.
        number: what the config calls the number of experts.
        chosen: what it calls the number of those that a token is sent to.
    """

    router: str = "mlp.gate"
    activation: str = "act_fn"
    number: str = "num_local_experts"
    chosen: str = "num_experts_per_tok"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a branch of a decoder layer does around its linear maps, by the names of the family's classes.

    Attributes:
        norm: normalises what the branch reads; None where nothing does.
        output_norm: normalises what the branch adds; None where nothing does.
        stacked: how many projections into the branch are stored as one; the first has a row for each of the output
            projection's columns, the others share the rest evenly.
        activation: what follows the only projection into a branch that is no module of its own.
        whole: why no unit of the branch can go, where none can.
        experts: what it says of its experts, where it has some.
    """

    norm: str | None
    output_norm: str | None = None
    stacked: int = 1
    activation: str | None = None
    whole: str = ""
    experts: Experts | None = None


@dataclass(frozen=True)
class Branch:
    """One branch of a decoder layer."""

    names: LinearNames
    reading: Reading

    @property
    def has_experts(self) -> bool:
        """Whether the branch is a mixture of experts."""
        return self.reading.experts is not None

    @property
    def module(self) -> str:
        """Name of the branch's module, relative to the decoder layer; empty where that is the module."""
        return self.names.module

    @property
    def described(self) -> str:
        """What the branch is called in messages."""
        return self.module or self.names.output

    @property
    def output_weight(self) -> str:
        """Name of the output projection's weight, relative to the decoder layer."""
        return self._weight(self.output)

    @property
    def output_bias(self) -> str:
        """Name of the output projection's bias, relative to the decoder layer."""
        return f"{self.output}.bias"

    @property
    def output(self) -> str:
        """Name of the output projection, relative to the decoder layer."""
        return self._full(self.names.output)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the projections into the branch, relative to the decoder layer."""
        return tuple(self._full(name) for name in self.names.inputs)

    @property
    def input_weights(self) -> tuple[str, ...]:
        """Names of the weights into the branch, relative to the decoder layer."""
        return tuple(map(self._weight, self.inputs))

    def unstack(self, rows: Tensor, num_inputs: int) -> list[Tensor]:
        """Cut a weight or bias into the branch into those of the projections that are stored as one.

        Args:
            rows: (R, ...), as stored.
            num_inputs: columns of the output projection.
        """
        return list(rows.split(self._part_sizes(len(rows), num_inputs)))

    def kept_rows(self, num_rows: int, num_inputs: int, kept: Sequence[int], num_units: int) -> Tensor:
        """Return which rows of a projection into the branch stay where some units do.

        Args:
            num_rows: rows of the projection, as stored.
            num_inputs: columns of the output projection.
            kept: the units that stay, ascending.
            num_units: of how many.
        """
        rows, start = [], 0
        for size in self._part_sizes(num_rows, num_inputs):
            rows.append(start + unit_rows(kept, num_units, size))
            start += size
        return torch.cat(rows)

    def _part_sizes(self, num_rows: int, num_inputs: int) -> list[int]:
        if self.reading.stacked == 1:
            return [num_rows]
        others = self.reading.stacked - 1
        return [num_inputs] + [(num_rows - num_inputs) // others] * others

    def _weight(self, name: str) -> str:
        """Return the name of a projection's weight; that of experts is a parameter of theirs, not of a module."""
        return name if self.has_experts else f"{name}.weight"

    def _full(self, name: str) -> str:
        return f"{self.module}.{name}" if self.module else name


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes:
        name: The name in its classes: Pruned<name>ForCausalLM.
        model_type: What the config.json of a dense model gives as its type.
        file: The file of `pruned/` with its classes; pruned_<model_type> if empty.
        layers: Name of the list of decoder layers in the model.
        attention_names: The linear maps of the attention, as the pruned class names them.
        mlp_names: The linear maps of the MLP, as the pruned class names them.
        attention_reading: What the attention does around them.
        mlp_reading: What the MLP does around them.
        intermediate_size: What its config calls the number of channels.
        residual_multiplier: What its config calls the multiplier of what branches add, if it has one.
        parallel: What its config calls the flag of layers whose MLP reads what the attention reads, if it has one.
        requires: Settings of which one value alone is supported, and why where that needs to be said.
        stored_as: Modules outside the layers, and what dense checkpoints call them instead.
        stored: Tensors of the layers that dense checkpoints call otherwise, or hold in parts.
    """

    name: str
    model_type: str
    file: str = ""
    layers: str = PrunedModelMixin.layers_path
    attention_names: LinearNames = PrunedModelMixin.attention_names
    mlp_names: LinearNames = PrunedModelMixin.mlp_names
    attention_reading: Reading = Reading(norm="input_layernorm")
    mlp_reading: Reading = Reading(norm="post_attention_layernorm")
    intermediate_size: str = "intermediate_size"
    residual_multiplier: str | None = None
    parallel: str | None = None
    requires: tuple[tuple[str, object, str], ...] = ()
    stored_as: tuple[tuple[str, str], ...] = ()
    stored: tuple[Stored, ...] = ()

    @property
    def class_name(self) -> str:
        """The name of the class of its pruned models."""
        return f"Pruned{self.name}ForCausalLM"

    @property
    def module(self) -> str:
        """The module that defines that class."""
        return f"{PRUNED_CLASSES}.{self.file or f'pruned_{self.model_type}'}"

    # Not cached: a row is pickled into processes that need no model.
    @property
    def pruned(self) -> type[PrunedModelMixin]:
        """The class of its pruned models, imported here, with transformers' modelling code of the family."""
        return getattr(import_module(self.module), self.class_name)

    @cached_property
    def attention(self) -> Branch:
        """The attention."""
        return Branch(self.attention_names, self.attention_reading)

    @cached_property
    def mlp(self) -> Branch:
        """The MLP."""
        return Branch(self.mlp_names, self.mlp_reading)

    @property
    def branches(self) -> Pair[Branch]:
        """The attention and the MLP."""
        return Pair(self.attention, self.mlp)

    def multiplier(self, config: PretrainedConfig) -> float:
        """Return what everything that a branch adds to the residual stream is multiplied by."""
        return 1.0 if self.residual_multiplier is None else getattr(config, self.residual_multiplier)

    def num_experts(self, config: PretrainedConfig) -> int:
        """Return how many MLPs a layer has; one, where there are no experts."""
        experts = self.mlp_reading.experts
        return 1 if experts is None else getattr(config, experts.number)

    def experts_per_token(self, config: PretrainedConfig) -> int:
        """Return how many of a layer's MLPs a token passes; one, where there are no experts."""
        experts = self.mlp_reading.experts
        return 1 if experts is None else getattr(config, experts.chosen)

    def is_parallel(self, config: PretrainedConfig) -> bool:
        """Return whether the MLP of a layer reads what its attention reads."""
        return self.parallel is not None and getattr(config, self.parallel)


# Gemma 2 and 3 normalise what a branch reads and what it adds, OLMo 2 only what it adds.
_GEMMA_ATTENTION = Reading(norm="input_layernorm", output_norm="post_attention_layernorm")
_GEMMA_MLP = Reading(norm="pre_feedforward_layernorm", output_norm="post_feedforward_layernorm")
_ALL_ALIKE = "where some layers have an MLP without experts, of another width, a row does not describe all of them"
_EXPERTS = Reading(norm="post_attention_layernorm", stacked=2, experts=Experts())

FAMILIES = (
    Family(name="Llama", model_type="llama"),
    Family(name="Mistral", model_type="mistral"),
    Family(name="Qwen2", model_type="qwen2"),
    Family(name="Qwen3", model_type="qwen3"),
    Family(name="Gemma", model_type="gemma"),
    Family(name="Gemma2", model_type="gemma2", attention_reading=_GEMMA_ATTENTION, mlp_reading=_GEMMA_MLP),
    Family(
        name="Gemma3",
        model_type="gemma3_text",
        file="pruned_gemma3",
        attention_reading=_GEMMA_ATTENTION,
        mlp_reading=_GEMMA_MLP,
    ),
    Family(
        name="Phi3",
        model_type="phi3",
        attention_names=LinearNames("self_attn", ("qkv_proj",), "o_proj"),
        mlp_names=LinearNames("mlp", ("gate_up_proj",), "down_proj"),
        attention_reading=Reading(norm="input_layernorm", stacked=3),
        mlp_reading=Reading(norm="post_attention_layernorm", stacked=2),
    ),
    Family(name="Granite", model_type="granite", residual_multiplier="residual_multiplier"),
    Family(
        name="Olmo2",
        model_type="olmo2",
        attention_reading=Reading(
            norm=None,
            output_norm="post_attention_layernorm",
            whole="its q_norm and k_norm run over all heads at once, so that without one the others change",
        ),
        mlp_reading=Reading(norm=None, output_norm="post_feedforward_layernorm"),
    ),
    Family(name="SmolLM3", model_type="smollm3"),
    Family(name="Starcoder2", model_type="starcoder2", mlp_names=LinearNames("mlp", ("c_fc",), "c_proj")),
    Family(
        name="OPT",
        model_type="opt",
        layers="model.decoder.layers",
        attention_names=LinearNames("self_attn", ("q_proj", "k_proj", "v_proj"), "out_proj"),
        mlp_names=LinearNames("", ("fc1",), "fc2"),
        attention_reading=Reading(norm="self_attn_layer_norm"),
        mlp_reading=Reading(norm="final_layer_norm", activation="activation_fn"),
        intermediate_size="ffn_dim",
        requires=(("do_layer_norm_before", True, ""),),
    ),
    # The rows of its query_key_value lie head by head, so they are units as they are.
    Family(
        name="GPTNeoX",
        model_type="gpt_neox",
        layers="gpt_neox.layers",
        attention_names=LinearNames("attention", ("query_key_value",), "dense"),
        mlp_names=LinearNames("mlp", ("dense_h_to_4h",), "dense_4h_to_h"),
        parallel="use_parallel_residual",
        stored_as=(("lm_head", "embed_out"),),
    ),
    Family(
        name="Mixtral",
        model_type="mixtral",
        mlp_names=PrunedExpertsMixin.mlp_names,
        mlp_reading=_EXPERTS,
        stored=(
            Stored("mlp.gate.weight", ("block_sparse_moe.gate.weight",)),
            Stored(
                "mlp.experts.gate_up_proj",
                ("block_sparse_moe.experts.{expert}.w1.weight", "block_sparse_moe.experts.{expert}.w3.weight"),
            ),
            Stored("mlp.experts.down_proj", ("block_sparse_moe.experts.{expert}.w2.weight",)),
        ),
    ),
    Family(
        name="Qwen3Moe",
        model_type="qwen3_moe",
        mlp_names=PrunedExpertsMixin.mlp_names,
        mlp_reading=_EXPERTS,
        intermediate_size="moe_intermediate_size",
        requires=(("decoder_sparse_step", 1, _ALL_ALIKE), ("mlp_only_layers", [], _ALL_ALIKE)),
        stored=(
            Stored(
                "mlp.experts.gate_up_proj",
                ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
            ),
            Stored("mlp.experts.down_proj", ("mlp.experts.{expert}.down_proj.weight",)),
        ),
    ),
)


def family_of(config: PretrainedConfig) -> Family:
    """Return the row of a model's config, be the model dense or pruned.

    Raises:
        CheckpointError: the architecture has no row.
    """
    return family_named(config.model_type)


def family_named(model_type: object) -> Family:
    """Return the row of what a config.json gives as its model's type.

    Raises:
        CheckpointError: there is none.
    """
    for family in FAMILIES:
        if model_type in (family.model_type, f"pruned_{family.model_type}"):
            return family
    found = (
        "no model_type is given"
        if model_type is None
        else f"models of type {shown(repr(model_type))} are not supported"
    )
    raise CheckpointError(
        f"{found}; supported: {', '.join(family.model_type for family in FAMILIES)} "
        f"(docs/families.md says how to add one)"
    )


@dataclass(frozen=True)
class LayerShape:
    """What each branch of a layer is made of.

    Where every head has its own keys and values there are as many KV groups as heads. They are the units of an
    attention that can lose some, one that cannot is a unit as a whole. Where there are experts, `intermediate_size` is
    the number of each one's channels.
    """

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_attention_units: int
    num_experts: int = 1

    @property
    def num_channels(self) -> int:
        """Channels of the layer's MLP, or of all its experts."""
        return self.num_experts * self.intermediate_size


def layer_shape(config: PretrainedConfig, layer: int) -> LayerShape:
    """Return the shape of a layer, from a dense model's config or from a pruned one's."""
    family = family_of(config)
    if getattr(config, "num_attention_heads_per_layer", None) is None:
        heads, channels = config.num_attention_heads, getattr(config, family.intermediate_size)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
    else:
        heads = config.num_attention_heads_per_layer[layer]
        kv_heads = config.num_key_value_heads_per_layer[layer]
        channels = config.intermediate_size_per_layer[layer]
    units = 1 if family.attention.reading.whole else kv_heads
    return LayerShape(heads, kv_heads, channels, units, family.num_experts(config))
