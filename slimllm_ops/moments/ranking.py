"""Orders the units of a module for removal, with the cost of each removal."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """An order of removal: the first unit is removed first.

    `costs[i]` is the cost of removing `order[i]` after all units before it, in the method's own unit.
    The last unit of a module is never removed, and its cost is not used.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]

    @classmethod
    def by_score(cls, scores: Tensor) -> "Ranking":
        """Rank units by score, lowest first; the score is the cost."""
        values, order = torch.sort(scores, stable=True)
        return cls(tuple(order.tolist()), tuple(values.tolist()))

    @classmethod
    def in_turn(cls, rankings: Sequence["Ranking"]) -> "Ranking":
        """Interleave the rankings of a module's parts: one unit of each part in turn, in the part's own order.

        All parts have the same number of units, and are numbered one after another.
        """
        steps = list(zip(*(ranking.order for ranking in rankings), strict=True))
        costs = zip(*(ranking.costs for ranking in rankings), strict=True)
        order = (part * len(steps) + unit for step in steps for part, unit in enumerate(step))
        return cls(tuple(order), tuple(cost for step in costs for cost in step))

    def scaled(self, factor: float) -> "Ranking":
        """Return the same order with every cost multiplied by `factor`."""
        return self if factor == 1 else Ranking(self.order, tuple(factor * cost for cost in self.costs))

    def kept_after(self, num_removed: int) -> tuple[int, ...]:
        """Return the units left after `num_removed` removals, in ascending order."""
        return tuple(sorted(self.order[num_removed:]))

    def scores(self) -> tuple[float, ...]:
        """Return the cost of removing each unit, indexed by unit."""
        by_unit = dict(zip(self.order, self.costs, strict=True))
        return tuple(by_unit[unit] for unit in range(len(self.order)))
