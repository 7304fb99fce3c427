"""Closes the gap that large units leave below a target when the small ones may not go.

A budget fills with channels what heads leave. Where every layer has lost as many channels as it may, the last head does
not fit, and up to a head is missing. Then the head goes, and channels are put back.
"""

from collections.abc import Callable, Sequence
from typing import Protocol


class Shrinking(Protocol):
    """A module that shrinks unit by unit."""

    @property
    def removable(self) -> int:
        """The number of units that may go."""

    @property
    def unit_parameters(self) -> int:
        """The number of parameters in a unit."""

    def removed_parameters(self, num_removed: int) -> int:
        """Return by how many parameters the module shrinks without some units."""


# What it costs to remove the next unit of a module, by its index, that has lost some.
Price = Callable[[int, int], float]


def close_gap(modules: Sequence[Shrinking], removed: Sequence[int], target: int, price: Price) -> list[int]:
    """Return counts nearer below the target, if what is missing is more than the smallest unit.

    Args:
        modules: The modules.
        removed: The number of units that each loses.
        target: Number of parameters to remove.
        price: Orders the units: the cheapest that may go goes first, and the dearest that went is put back first.
    """
    counts = list(removed)
    missing = target - sum(one.removed_parameters(count) for one, count in zip(modules, counts, strict=True))
    smallest = min((one.unit_parameters for one in modules if one.removable), default=missing + 1)
    while missing >= smallest:
        more = sorted((price(i, counts[i]), i) for i, one in enumerate(modules) if counts[i] < one.removable)
        tried = (_exchange(modules, counts, missing, i, price) for _, i in more)
        nearer = next((one for one in tried if 0 <= one[1] < missing), None)
        if nearer is None:
            break
        counts, missing = nearer
    return counts


def _exchange(
    modules: Sequence[Shrinking], removed: Sequence[int], missing: int, large: int, price: Price
) -> tuple[list[int], int]:
    """Remove a unit of one module, and put back smaller units until no more than the target is removed.

    Returns:
        The counts, and what they miss; it is negative if there are too few smaller units.
    """
    counts = list(removed)
    counts[large] += 1
    missing -= _last_gain(modules[large], counts[large])
    smaller = [i for i, one in enumerate(modules) if one.unit_parameters < modules[large].unit_parameters]
    while missing < 0 and (given := [i for i in smaller if counts[i]]):
        dearest = max(given, key=lambda i: price(i, counts[i] - 1))
        missing += _last_gain(modules[dearest], counts[dearest])
        counts[dearest] -= 1
    return counts, missing


def _last_gain(module: Shrinking, num_removed: int) -> int:
    """Return how many parameters the last of some removed units saves."""
    return module.removed_parameters(num_removed) - module.removed_parameters(num_removed - 1)
