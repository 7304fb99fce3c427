"""Model families as a table: how each names its parts. A family of the same build is one more row.

A row describes decoder layers whose residual stream passes two branches, each normalised on entry:

    h = h + output_projection(attention(norm(h)))
    h = h + output_projection(mlp(norm(h)))

A branch consists of units (KV groups; channels). The rows of every projection into it, and the columns of its
output projection, lie unit by unit, so that nothing more need be known to take units out.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from slimllm_ops.errors import CheckpointError, shown


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch of a decoder layer, by the names of the family's transformers classes."""

    norm: str
    module: str
    inputs: tuple[str, ...]
    output: str

    @property
    def output_weight(self) -> str:
        """Name of the output projection's weight, relative to the decoder layer."""
        return f"{self.module}.{self.output}.weight"

    @property
    def output_bias(self) -> str:
        """Name of the output projection's bias, relative to the decoder layer."""
        return f"{self.module}.{self.output}.bias"

    @property
    def input_weights(self) -> tuple[str, ...]:
        """Names of the weights into the branch, relative to the decoder layer."""
        return tuple(f"{self.module}.{name}.weight" for name in self.inputs)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table. `name` makes the class of its pruned models: Pruned<name>ForCausalLM."""

    name: str
    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: Branch = Branch(
        norm="input_layernorm", module="self_attn", inputs=("q_proj", "k_proj", "v_proj"), output="o_proj"
    )
    mlp: Branch = Branch(
        norm="post_attention_layernorm", module="mlp", inputs=("gate_proj", "up_proj"), output="down_proj"
    )


FAMILIES = (Family(name="Llama", model_type="llama"),)


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
    """How many units each branch of a layer has."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


def layer_shape(config: PretrainedConfig, layer: int) -> LayerShape:
    """Return the shape of a layer, from a dense model's config or from a pruned one's."""
    if getattr(config, "num_attention_heads_per_layer", None) is None:
        return LayerShape(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return LayerShape(
        config.num_attention_heads_per_layer[layer],
        config.num_key_value_heads_per_layer[layer],
        config.intermediate_size_per_layer[layer],
    )
