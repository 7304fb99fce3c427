r"""Spends a budget of parameters over all layers and both kinds of module at once.

Every module comes with a ranking of its units and the cost of each removal. The rules here decide how many units each
module loses, so that the number of removed parameters meets the target to within the smallest unit.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slimllm_ops.allocate.gap import close_gap
from slimllm_ops.errors import InputError
from slimllm_ops.moments.ranking import Ranking

BISECTIONS = 60


def removable(number: int, limit: float) -> int:
    """Return how many of a module's units may go: at most a fraction of them, and never the last one."""
    # A limit of .29 is stored as a little less, and times 100 it is less than 29.
    return max(0, min(number - 1, math.floor(limit * number + 1e-9)))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module that units can be removed from.

    Attributes:
        layer: The decoder layer that it belongs to; the mean, if it stands for modules of several.
        ranking: The order in which its units are removed, and their costs.
        unit_parameters: The number of parameters in a unit.
        bias_parameters: The number of parameters that its recovery adds, once.
        output_variance: The variance of the module's output, summed over the dims: tr(W^T C W).
        stream_power: E|h|^2 of the layer's output, the residual stream.
        units_at_once: The number of units removed together: with experts, one of each.
        limit: The greatest fraction of the units that may go.
    """

    layer: float
    ranking: Ranking
    unit_parameters: int
    bias_parameters: int
    output_variance: float
    stream_power: float
    units_at_once: int = 1
    limit: float = 1.0

    @property
    def num_units(self) -> int:
        """The number of units in the module."""
        return len(self.ranking.order)

    @property
    def removable(self) -> int:
        """The number of units that may go."""
        return removable(self.num_units, self.limit)

    def removed_parameters(self, num_removed: int) -> int:
        """Return by how many parameters the module shrinks when `num_removed` units are removed."""
        return num_removed * self.unit_parameters - self.bias_parameters * (num_removed > 0)


def in_steps(candidate: Candidate, width: int) -> Candidate:
    """Return the module with its units grouped in order, `width` at a time."""
    if width == 1:
        return candidate
    costs = candidate.ranking.costs
    steps = tuple(sum(costs[start : start + width]) for start in range(0, len(costs), width))
    ranking = Ranking(tuple(range(len(steps))), steps)
    return replace(candidate, ranking=ranking, unit_parameters=candidate.unit_parameters * width)


def as_one(candidates: Sequence[Candidate], layer: float = 0) -> Candidate:
    """Merge modules of one size that lose the same number of units into one, with their costs summed."""
    costs = tuple(sum(one.ranking.costs[index] for one in candidates) for index in range(candidates[0].num_units))
    return Candidate(
        layer=layer,
        ranking=Ranking(tuple(range(len(costs))), costs),
        unit_parameters=sum(one.unit_parameters for one in candidates),
        bias_parameters=sum(one.bias_parameters for one in candidates),
        output_variance=1.0,
        stream_power=1.0,
        limit=min(one.limit for one in candidates),
    )


def spend_by_cost(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove the units that cost least per parameter; gram's costs are what an error adds to the loss, in nats."""
    return spend_by_price(candidates, target, cost_per_parameter)


def cost_per_parameter(candidate: Candidate, num_removed: int) -> float:
    """Return the cost of removing the next unit of a module, for each of its parameters."""
    return candidate.ranking.costs[num_removed] / candidate.unit_parameters


def spend_by_relative_error(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove the units whose error, as a fraction of the output's variance, is least per parameter (ZipLM)."""

    def price(candidate: Candidate, num_removed: int) -> float:
        return cost_per_parameter(candidate, num_removed) / max(candidate.output_variance, 1e-300)

    return spend_by_price(candidates, target, price)


def spend_by_standard_score(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove the units of lowest cost, after standardising each module's costs to mean 0 and deviation 1 (FLAP)."""
    scales = []
    for candidate in candidates:
        costs = candidate.ranking.costs
        mean = sum(costs) / len(costs)
        deviation = math.sqrt(sum((cost - mean) ** 2 for cost in costs) / len(costs))
        scales.append((mean, max(deviation, 1e-300)))
    standards = dict(zip(map(id, candidates), scales, strict=True))

    def price(candidate: Candidate, num_removed: int) -> float:
        mean, deviation = standards[id(candidate)]
        return (candidate.ranking.costs[num_removed] - mean) / deviation

    return spend_by_price(candidates, target, price)


def spend_evenly(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove the same fraction of every module's units."""
    return _spend_by_shares(candidates, target, [1.0 for _ in candidates])


def spend_by_depth(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove a fraction that grows with the logarithm of the depth, least from the first layer (SlimGPT)."""
    shares = [math.log(2 + candidate.layer) for candidate in candidates]
    return _spend_by_shares(candidates, target, shares)


def spend_by_price(candidates: Sequence[Candidate], target: int, price: Callable[[Candidate, int], float]) -> list[int]:
    """Remove the cheapest next unit of any module until the target is met.

    If a unit would overshoot, it and the rest of its module are skipped; smaller units of other modules fill the gap.
    If those are used up, a large unit goes and small ones are put back.
    """
    removed = [0] * len(candidates)
    queue = [(price(candidate, 0), i) for i, candidate in enumerate(candidates) if candidate.removable]
    heapq.heapify(queue)
    missing = target
    while queue:
        _, i = heapq.heappop(queue)
        missing -= (gain := _next_gain(candidates[i], removed[i], missing))
        removed[i] += gain > 0
        if gain and removed[i] < candidates[i].removable:
            heapq.heappush(queue, (price(candidates[i], removed[i]), i))
    _require_spent(candidates, removed, missing)
    return close_gap(candidates, removed, target, lambda i, count: price(candidates[i], count))


def _spend_by_shares(candidates: Sequence[Candidate], target: int, shares: Sequence[float]) -> list[int]:
    """Remove fractions proportional to shares, then fill the gap left by rounding with single units, in turn."""
    low, high = 0.0, 1.0 / min(shares)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _removed(candidates, _rounded(candidates, shares, middle)) <= target:
            low = middle
        else:
            high = middle
    removed = _rounded(candidates, shares, low)
    missing = target - _removed(candidates, removed)
    given = True
    while given:
        given = False
        for i, candidate in enumerate(candidates):
            if removed[i] < candidate.removable and (gain := _next_gain(candidate, removed[i], missing)):
                removed[i], missing, given = removed[i] + 1, missing - gain, True
    _require_spent(candidates, removed, missing)
    return removed


def _next_gain(candidate: Candidate, num_removed: int, missing: int) -> int:
    """Return how many parameters the next unit saves, or 0 if that is more than what is missing."""
    gain = candidate.removed_parameters(num_removed + 1) - candidate.removed_parameters(num_removed)
    return gain if 0 < gain <= missing else 0


def _rounded(candidates: Sequence[Candidate], shares: Sequence[float], ratio: float) -> list[int]:
    return [
        min(int(ratio * share * candidate.num_units), candidate.removable)
        for candidate, share in zip(candidates, shares, strict=True)
    ]


def _removed(candidates: Sequence[Candidate], removed: Sequence[int]) -> int:
    return sum(candidate.removed_parameters(count) for candidate, count in zip(candidates, removed, strict=True))


def _require_spent(candidates: Sequence[Candidate], removed: Sequence[int], missing: int) -> None:
    """Raise if the target exceeds what the modules can give; a gap smaller than the smallest unit is accepted."""
    target = _removed(candidates, removed) + missing
    most = _removed(candidates, [candidate.removable for candidate in candidates])
    if target <= most or missing < min(candidate.unit_parameters for candidate in candidates):
        return
    raise InputError(
        f"{target:,} parameters should be removed, but with the fewest heads (KV groups) and "
        f"channels that may stay in every layer only {most:,} can be: ask for a lower sparsity"
    )
