"""Describes the model families in a table: how each names its parts. A family with the same structure is one more row.

A row describes decoder layers whose residual stream passes through two branches:

    h = h + multiplier * output_norm(output_projection(attention(norm(h))))
    h = h + multiplier * output_norm(output_projection(mlp(norm(h))))

Most families have no output norm and no multiplier, and some have no input norm. In a parallel layer, the MLP reads the
same input as the attention. A branch consists of units: KV groups or channels. The rows of its input projections and
the columns of its output projection are ordered by unit, so this is all that is needed to remove units. Where several
projections are stored as one, they are stacked, and the rows of each are ordered by unit.

The MLP of a mixture of experts consists of many such branches, and each token passes through a few of them. One weight
tensor (E, rows, columns) holds all experts, so every expert keeps the same number of channels, though not the same
ones. A unit is a channel of one expert, and units are numbered expert by expert: e I + c is channel c of expert e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.models.pair import Pair
from slimllm_ops.models.pruned.pruned_layers import LinearNames, PrunedExpertsMixin, PrunedModelMixin
from slimllm_ops.models.refusals import reason_against
from slimllm_ops.models.tensor_layout import Stored

# Processes that only solve read this table, and do not need transformers, which takes seconds to import.
if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The package of the pruned classes, with a file for each family.
PRUNED_CLASSES = "slimllm_ops.models.pruned"


def unit_rows(units: Sequence[int], num_units: int, num_rows: int) -> Tensor:
    """Return the rows of some units, if each of `num_units` owns an equal, contiguous share of `num_rows` rows."""
    width = num_rows // num_units
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The names of a family's router and of its settings for experts.

    Attributes:
        router: The module that maps tokens (N, D) to logits, expert weights (N, k) and expert numbers (N, k).
        activation: The experts' activation module, applied to the output of the gate.
        number: The config's name for the number of experts.
        chosen: The config's name for the number of experts that a token is sent to.
    """

    router: str = "mlp.gate"
    activation: str = "act_fn"
    number: str = "num_local_experts"
    chosen: str = "num_experts_per_tok"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a branch of a decoder layer does around its linear maps, by the names in the family's classes.

    Attributes:
        norm: The norm of the branch's input; None if there is none.
        output_norm: The norm of what the branch adds; None if there is none.
        stacked: The number of input projections stored as one. The first has one row for each column of the output
            projection, and the others share the remaining rows evenly.
        activation: The activation after the only input projection, for a branch that is not a module of its own.
        whole: The reason why no unit of the branch can be removed; empty if units can be.
        experts: The names for its experts, if it has any.
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
        """The name of the branch's module, relative to the decoder layer; empty if it is the layer itself."""
        return self.names.module

    @property
    def described(self) -> str:
        """The branch's name in messages."""
        return self.module or self.names.output

    @property
    def output_weight(self) -> str:
        """The name of the output projection's weight, relative to the decoder layer."""
        return self._weight(self.output)

    @property
    def output_bias(self) -> str:
        """The name of the output projection's bias, relative to the decoder layer."""
        return f"{self.output}.bias"

    @property
    def output(self) -> str:
        """The name of the output projection, relative to the decoder layer."""
        return self._full(self.names.output)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the input projections, relative to the decoder layer."""
        return tuple(self._full(name) for name in self.names.inputs)

    @property
    def input_weights(self) -> tuple[str, ...]:
        """The names of the input projections' weights, relative to the decoder layer."""
        return tuple(map(self._weight, self.inputs))

    def unstack(self, rows: Tensor, num_inputs: int) -> list[Tensor]:
        """Split a stored weight or bias of the input projections into one per projection.

        Args:
            rows: The stored tensor (R, ...).
            num_inputs: The number of columns of the output projection.
        """
        return list(rows.split(self._part_sizes(len(rows), num_inputs)))

    def kept_rows(self, num_rows: int, num_inputs: int, kept: Sequence[int], num_units: int) -> Tensor:
        """Return the rows of a stored input projection that belong to the kept units.

        Args:
            num_rows: The number of rows of the projection, as stored.
            num_inputs: The number of columns of the output projection.
            kept: The units that stay, ascending.
            num_units: The number of units in the dense branch.
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
        """Return the name of a projection's weight; with experts, the projection is a parameter, not a module."""
        return name if self.has_experts else f"{name}.weight"

    def _full(self, name: str) -> str:
        return f"{self.module}.{name}" if self.module else name


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes:
        name: The name in its classes: Pruned<name>Model and Pruned<name>ForCausalLM.
        model_type: The `model_type` in the config.json of a dense model.
        file: The file in `pruned/` with its classes; pruned_<model_type> if empty.
        layers: The name of the list of decoder layers in the model.
        attention_names: The linear maps of the attention, as the pruned class names them.
        mlp_names: The linear maps of the MLP, as the pruned class names them.
        attention_reading: What the attention does around its linear maps.
        mlp_reading: What the MLP does around its linear maps.
        intermediate_size: The config's name for the number of channels.
        residual_multiplier: The config's name for the multiplier of what branches add, if it has one.
        parallel: Whether the MLP reads the attention's input, or the config's name for the flag that says so.
        requires: Settings with a single supported value: name, value, and the reason if it needs one.
        stored_as: Modules outside the layers, and their names in dense checkpoints if those differ.
        stored: Tensors of the layers that dense checkpoints store under another name or in parts.
    """

    name: str
    model_type: str
    file: str = ""
    layers: str = "model.layers"
    attention_names: LinearNames = PrunedModelMixin.attention_names
    mlp_names: LinearNames = PrunedModelMixin.mlp_names
    attention_reading: Reading = Reading(norm="input_layernorm")
    mlp_reading: Reading = Reading(norm="post_attention_layernorm")
    intermediate_size: str = "intermediate_size"
    residual_multiplier: str | None = None
    parallel: str | bool = False
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

    # Not cached: rows are pickled into processes that need no model.
    @property
    def pruned(self) -> type[PrunedModelMixin]:
        """The class of its pruned models; this imports it, with transformers' modelling code for the family."""
        return getattr(import_module(self.module), self.class_name)

    @property
    def pruned_base(self) -> type[PrunedModelMixin]:
        """The class of its pruned models without a head, from the same file."""
        return getattr(import_module(self.module), f"Pruned{self.name}Model")

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
        """Return the multiplier of everything that a branch adds to the residual stream."""
        return 1.0 if self.residual_multiplier is None else getattr(config, self.residual_multiplier)

    def num_experts(self, config: PretrainedConfig) -> int:
        """Return the number of MLPs in a layer: one, unless there are experts."""
        experts = self.mlp_reading.experts
        return 1 if experts is None else getattr(config, experts.number)

    def experts_per_token(self, config: PretrainedConfig) -> int:
        """Return how many of a layer's MLPs a token passes through: one, unless there are experts."""
        experts = self.mlp_reading.experts
        return 1 if experts is None else getattr(config, experts.chosen)

    def is_parallel(self, config: PretrainedConfig) -> bool:
        """Return whether a layer's MLP reads the same input as its attention."""
        return self.parallel if isinstance(self.parallel, bool) else bool(getattr(config, self.parallel))


# Gemma 2 and 3 normalise the input and output of a branch, OLMo 2 and EXAONE 4 only the output.
_GEMMA_ATTENTION = Reading(norm="input_layernorm", output_norm="post_attention_layernorm")
_GEMMA_MLP = Reading(norm="pre_feedforward_layernorm", output_norm="post_feedforward_layernorm")
_NORMED_OUTPUTS = Pair(
    Reading(norm=None, output_norm="post_attention_layernorm"),
    Reading(norm=None, output_norm="post_feedforward_layernorm"),
)
_NORMED_TOGETHER = "its q_norm and k_norm normalise all heads together, so removing one changes the others"
_WITHOUT_GATE = LinearNames("mlp", ("up_proj",), "down_proj")
_FUSED_GATE = LinearNames("mlp", ("gate_up_proj",), "down_proj")
_ALL_ALIKE = "otherwise some layers have a plain MLP of another width, which is not supported"
_EXPERTS = Reading(norm="post_attention_layernorm", stacked=2, experts=Experts())
# How checkpoints store the experts of most families.
_BY_EXPERT = (
    Stored(
        "mlp.experts.gate_up_proj", ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight")
    ),
    Stored("mlp.experts.down_proj", ("mlp.experts.{expert}.down_proj.weight",)),
)

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
        mlp_names=_FUSED_GATE,
        attention_reading=Reading(norm="input_layernorm", stacked=3),
        mlp_reading=Reading(norm="post_attention_layernorm", stacked=2),
    ),
    Family(name="Granite", model_type="granite", residual_multiplier="residual_multiplier"),
    Family(
        name="Olmo2",
        model_type="olmo2",
        attention_reading=replace(_NORMED_OUTPUTS.attention, whole=_NORMED_TOGETHER),
        mlp_reading=_NORMED_OUTPUTS.mlp,
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
    # The rows of its query_key_value are ordered by head, so it needs no `stacked`.
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
        stored=_BY_EXPERT,
    ),
    Family(
        name="Olmo3",
        model_type="olmo3",
        attention_reading=replace(_NORMED_OUTPUTS.attention, whole=_NORMED_TOGETHER),
        mlp_reading=_NORMED_OUTPUTS.mlp,
    ),
    Family(name="SeedOss", model_type="seed_oss"),
    Family(
        name="Exaone4",
        model_type="exaone4",
        attention_reading=_NORMED_OUTPUTS.attention,
        mlp_reading=_NORMED_OUTPUTS.mlp,
    ),
    Family(name="Ernie4_5", model_type="ernie4_5"),
    Family(name="HunYuanDenseV1", model_type="hunyuan_v1_dense"),
    Family(
        name="Apertus",
        model_type="apertus",
        mlp_names=_WITHOUT_GATE,
        attention_reading=Reading(norm="attention_layernorm"),
        mlp_reading=Reading(norm="feedforward_layernorm"),
    ),
    Family(name="Nemotron", model_type="nemotron", mlp_names=_WITHOUT_GATE),
    Family(
        name="Glm",
        model_type="glm",
        mlp_names=_FUSED_GATE,
        mlp_reading=Reading(norm="post_attention_layernorm", stacked=2),
    ),
    Family(
        name="Glm4",
        model_type="glm4",
        mlp_names=_FUSED_GATE,
        attention_reading=Reading(norm="input_layernorm", output_norm="post_self_attn_layernorm"),
        mlp_reading=Reading(norm="post_attention_layernorm", output_norm="post_mlp_layernorm", stacked=2),
    ),
    Family(
        name="Cohere2",
        model_type="cohere2",
        mlp_reading=Reading(norm="input_layernorm"),
        parallel=True,
    ),
    Family(name="Ministral", model_type="ministral"),
    Family(name="Ministral3", model_type="ministral3"),
    Family(
        name="Olmoe",
        model_type="olmoe",
        mlp_names=PrunedExpertsMixin.mlp_names,
        attention_reading=Reading(norm="input_layernorm", whole=_NORMED_TOGETHER),
        mlp_reading=_EXPERTS,
        stored=_BY_EXPERT,
    ),
)


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a dense or pruned model from its config.

    Raises:
        CheckpointError: The table has no such family.
    """
    return family_named(config.model_type)


def family_named(model_type: object) -> Family:
    """Return the family for the `model_type` of a dense or pruned model's config.json.

    Raises:
        CheckpointError: The table has no such family.
    """
    for family in FAMILIES:
        if model_type in _types_of(family):
            return family
    if model_type is None:
        found = "no model_type is given"
    elif reason := reason_against(model_type):
        raise CheckpointError(
            f"models of type {model_type!r} are not supported: {reason} (`slimllm families` lists those that are)"
        )
    else:
        found = f"models of type {shown(repr(model_type))} are not supported"
    raise CheckpointError(
        f"{found}; supported: {', '.join(family.model_type for family in FAMILIES)} "
        f"(docs/families.md says how to add one)"
    )


def is_supported(model_type: object) -> bool:
    """Return whether the table has a family for a `model_type`."""
    return any(model_type in _types_of(family) for family in FAMILIES)


def _types_of(family: Family) -> tuple[str, str]:
    """Return the `model_type` of a family's dense models, and that of its pruned ones."""
    return family.model_type, f"pruned_{family.model_type}"


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of a head, which pruning leaves as it is, from the config of a dense or pruned model."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer's branches.

    In multi-head attention, there are as many KV groups as heads. The KV groups are the units of an attention module,
    unless it cannot lose any: then the whole module is one unit. With experts, `intermediate_size` is the number of
    channels in each expert.
    """

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_attention_units: int
    num_experts: int = 1

    @property
    def num_channels(self) -> int:
        """The number of channels in the layer's MLP, or in all its experts."""
        return self.num_experts * self.intermediate_size


def layer_shape(config: PretrainedConfig, layer: int) -> LayerShape:
    """Return the shape of a layer from the config of a dense or pruned model."""
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
