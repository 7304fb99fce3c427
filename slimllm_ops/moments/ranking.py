"""In which order the units of a module go, and what each removal costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """An order of removal: the first unit goes first.

    `costs` are what the removals cost, one after the other, in the order of `order`; their unit is the method's.
    The last unit of a module is never removed, and its cost is not looked at.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]

    @classmethod
    def by_score(cls, scores: Tensor) -> "Ranking":
        """Rank units by a score of each, the lowest first, at a cost of that score."""
        values, order = torch.sort(scores, stable=True)
        return cls(tuple(order.tolist()), tuple(values.tolist()))

    @classmethod
    def in_turn(cls, rankings: Sequence["Ranking"]) -> "Ranking":
        """Return the ranking of all parts of a module that takes one unit of each at a time, each in its own order.

        The parts have the same number of units, and those of a part follow those of the part before it.
        """
        steps = list(zip(*(ranking.order for ranking in rankings), strict=True))
        costs = zip(*(ranking.costs for ranking in rankings), strict=True)
        order = (part * len(steps) + unit for step in steps for part, unit in enumerate(step))
        return cls(tuple(order), tuple(cost for step in costs for cost in step))

    def scaled(self, factor: float) -> "Ranking":
        """Return the same order at costs so many times as high."""
        return self if factor == 1 else Ranking(self.order, tuple(factor * cost for cost in self.costs))

    def kept_after(self, num_removed: int) -> tuple[int, ...]:
        """Return the units that are left, ascending."""
        return tuple(sorted(self.order[num_removed:]))

    def scores(self) -> tuple[float, ...]:
        """Return each unit's cost of removal, by unit."""
        by_unit = dict(zip(self.order, self.costs, strict=True))
        return tuple(by_unit[unit] for unit in range(len(self.order)))
