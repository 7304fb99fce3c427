"""Says which sparsities a model can reach, from the sizes of its layers alone."""

import math
from collections.abc import Sequence

from slimllm_ops.allocate.layer_size import LayerSize, parameters_to_remove
from slimllm_ops.errors import InputError


def require_reachable(sizes: Sequence[LayerSize], sparsity: float, *, drop_layers: bool = False) -> None:
    """Check that a sparsity can be reached with what must stay in every layer, a KV group and a channel at least.

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


def unreachable(sizes: Sequence[LayerSize], sparsity: float, drop_layers: bool = False) -> InputError:
    """Return the error for a sparsity that these layers cannot reach."""
    # Rounded down, so that what the message names can be asked for.
    reachable = math.floor(1e3 * _most_removable(sizes, drop_layers) / sum(size.parameters for size in sizes)) / 1e3
    left = "in one layer" if drop_layers else "in every layer"
    limited = any(size.limit < 1 for size in sizes)
    protect_less = ", or protect less by --keep-layers or --max-layer-sparsity" if limited else ""
    return InputError(
        f"sparsity {sparsity:g} is not reachable: with the fewest heads (KV groups) and channels that may stay {left} "
        f"it is {reachable:.3f}; ask for less{protect_less}"
    )


def _most_removable(sizes: Sequence[LayerSize], drop_layers: bool) -> int:
    if not drop_layers:
        return sum(size.most_removable for size in sizes)
    # Of the layers that may lose anything, one stays. If heads are alike, their size stands beside those of the layers.
    may_go = [size for size in sizes if size.limit > 0]
    layers = [_least_left(size) for size in may_go if size.num_channels]
    heads = sum(_least_left(size) for size in may_go if not size.num_channels)
    return sum(size.parameters for size in may_go) - min(layers) - heads


def _least_left(size: LayerSize) -> int:
    """Return how many parameters one layer has left if it loses all that it may."""
    return (size.parameters - size.most_removable) // size.num_layers


def _least_removable(sizes: Sequence[LayerSize]) -> int | None:
    """Return the size of the smallest unit that may go; None if no unit may."""
    units = [size.removed_parameters(1, 0) for size in sizes if size.removable_units]
    return min(units + [size.removed_parameters(0, 1) for size in sizes if size.removable_channels], default=None)
