"""Measures decoder layers: how many units and channels each has, and how many parameters these hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimllm_ops.allocate.budget import removable
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import Branch, layer_shape


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """The size of a decoder layer; parameters are counts of scalars."""

    num_units: int  # KV groups; a whole attention is one unit
    unit_parameters: int
    num_channels: int
    channel_parameters: int
    # A recovery adds a bias to an output projection that had none.
    attention_bias_parameters: int
    mlp_bias_parameters: int
    parameters: int
    # More than one where the whole attention is one unit.
    kv_heads_per_unit: int = 1
    # With experts, a channel stands for one channel of each expert.
    num_experts: int = 1
    # In a uniform model, a single size stands for all layers. So does that of their heads, if only those are alike.
    num_layers: int = 1
    # The greatest fraction of its units, and of its channels, that may go.
    limit: float = 1.0

    @property
    def removable_units(self) -> int:
        """The number of units that may go."""
        return removable(self.num_units, self.limit)

    @property
    def removable_channels(self) -> int:
        """The number of channels that may go."""
        return removable(self.num_channels, self.limit)

    @property
    def most_removable(self) -> int:
        """By how many parameters the layer can shrink."""
        return self.removed_parameters(self.removable_units, self.removable_channels)

    def removed_parameters(self, units: int, channels: int) -> int:
        """Return by how many parameters the layer shrinks without these numbers of units and channels."""
        added = self.attention_bias_parameters * (units > 0) + self.mlp_bias_parameters * (channels > 0)
        return units * self.unit_parameters + channels * self.channel_parameters - added


def measure_layer(checkpoint: Checkpoint, layer: int, with_bias: bool = True) -> LayerSize:
    """Return the size of a decoder layer, from the shapes of its tensors.

    Args:
        checkpoint: The model.
        layer: The number of the layer.
        with_bias: Whether recovery adds biases.
    """
    shapes = checkpoint.layer_shapes(layer)
    shape = layer_shape(checkpoint.config, layer)
    attention, mlp = checkpoint.family.attention, checkpoint.family.mlp
    return LayerSize(
        num_units=shape.num_attention_units,
        unit_parameters=_branch_parameters(shapes, attention) // shape.num_attention_units,
        num_channels=shape.intermediate_size,
        channel_parameters=_branch_parameters(shapes, mlp) // shape.intermediate_size,
        attention_bias_parameters=_added_bias(shapes, attention) if with_bias else 0,
        mlp_bias_parameters=_added_bias(shapes, mlp) if with_bias and not mlp.has_experts else 0,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        kv_heads_per_unit=shape.num_key_value_heads // shape.num_attention_units,
        num_experts=shape.num_experts,
    )


def _branch_parameters(shapes: dict[str, tuple[int, ...]], branch: Branch) -> int:
    """Return the number of parameters in a branch's units: all except the bias of its output projection."""
    names = (*branch.input_weights, *(f"{name}.bias" for name in branch.inputs), branch.output_weight)
    return sum(math.prod(shapes[name]) for name in names if name in shapes)


def _added_bias(shapes: dict[str, tuple[int, ...]], branch: Branch) -> int:
    """Return how many parameters recovery adds to a branch: a bias, if its output projection has none yet."""
    return 0 if branch.output_bias in shapes else shapes[branch.output_weight][0]


def parameters_to_remove(sizes: Sequence[LayerSize], sparsity: float) -> int:
    """Return how many parameters a sparsity removes from decoder layers."""
    # A sparsity computed from a count must give that count again, even if its last digit is rounded down.
    return int(sparsity * sum(size.parameters for size in sizes) + 1e-3)
