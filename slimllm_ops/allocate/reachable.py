"""Says which sparsities a model can reach, from the sizes of its layers alone."""

import math
from collections.abc import Sequence

from slimllm_ops.allocate.layer_size import LayerSize, parameters_to_remove
from slimllm_ops.errors import InputError


def require_reachable(sizes: Sequence[LayerSize], sparsity: float, *, drop_layers: bool = False) -> None:
    """Check that a sparsity can be reached with one KV group and one channel left in every layer.

    Args:
        sizes: The size of each layer.
        sparsity: Fraction of the layers' parameters to remove.
        drop_layers: Whether whole layers may be removed, all but one.

    Raises:
        InputError: It cannot be reached, or removes less than any unit; the message says how much is possible.
    """
    least, total = _least_removable(sizes), sum(size.parameters for size in sizes)
    if least is not None and parameters_to_remove(sizes, sparsity) < least:
        raise InputError(
            f"sparsity {sparsity:g} removes nothing: the smallest head (KV group) or channel is "
            f"{math.ceil(1e6 * least / total) / 1e6:g} of the layers; ask for at least that"
        )
    if int(sparsity * total) > _most_removable(sizes, drop_layers):
        raise unreachable(sizes, sparsity, drop_layers)


def _most_removable(sizes: Sequence[LayerSize], drop_layers: bool = False) -> int:
    most = [size.removed_parameters(size.num_units - 1, size.num_channels - 1) for size in sizes]
    if not drop_layers:
        return sum(most)
    least_layer = min((size.parameters - gone) // size.num_layers for size, gone in zip(sizes, most, strict=True))
    return sum(size.parameters for size in sizes) - least_layer


def _least_removable(sizes: Sequence[LayerSize]) -> int | None:
    """Return the size of the smallest removable unit; None if every layer has one unit and one channel left."""
    units = [size.removed_parameters(1, 0) for size in sizes if size.num_units > 1]
    return min(units + [size.removed_parameters(0, 1) for size in sizes if size.num_channels > 1], default=None)


def unreachable(sizes: Sequence[LayerSize], sparsity: float, drop_layers: bool = False) -> InputError:
    """Return the error for a sparsity that these layers cannot reach."""
    reachable = _most_removable(sizes, drop_layers) / sum(size.parameters for size in sizes)
    left = "in one layer" if drop_layers else "in every layer"
    return InputError(
        f"sparsity {sparsity:g} is not reachable: with one head (KV group) and one channel left {left} "
        f"it is {reachable:.3f}; ask for less"
    )
