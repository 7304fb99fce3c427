r"""Spending a budget of parameters over all layers and both kinds of module at once.

Every module brings the order in which its units go and what each removal costs. The rules here say how many units
each module gives so that exactly the asked number of parameters goes, to within the smallest unit.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slimllm_ops.errors import InputError
from slimllm_ops.moments.ranking import Ranking

BISECTIONS = 60
# How much the power of the residual stream counts in the scale of a module's errors, against its own output's.
STREAM_WEIGHT = 0.75


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module that can give units, and what is known of it.

    Attributes:
        layer: the decoder layer that it belongs to.
        ranking: the order in which its units go, and their costs.
        unit_parameters: parameters of a unit.
        bias_parameters: parameters that its recovery adds once.
        output_variance: tr(W^T C W), the variance of the module's output, summed over the dims.
        stream_power: E|h|^2 of the layer's output, the residual stream.
        units_at_once: how many units go together, where there are experts: one of each.
    """

    layer: int
    ranking: Ranking
    unit_parameters: int
    bias_parameters: int
    output_variance: float
    stream_power: float
    units_at_once: int = 1

    @property
    def num_units(self) -> int:
        """How many units the module has."""
        return len(self.ranking.order)

    @property
    def scale(self) -> float:
        """What its errors are divided by, to compare with those of other modules."""
        return max(self.stream_power**STREAM_WEIGHT * self.output_variance ** (1 - STREAM_WEIGHT), 1e-300)

    def removed_parameters(self, num_removed: int) -> int:
        """Return how many parameters the module has fewer without so many units."""
        return num_removed * self.unit_parameters - self.bias_parameters * (num_removed > 0)


def in_steps(candidate: Candidate, width: int) -> Candidate:
    """Return a module whose units go so many at a time, in their order."""
    if width == 1:
        return candidate
    costs = candidate.ranking.costs
    steps = tuple(sum(costs[start : start + width]) for start in range(0, len(costs), width))
    ranking = Ranking(tuple(range(len(steps))), steps)
    return replace(candidate, ranking=ranking, unit_parameters=candidate.unit_parameters * width)


def as_one(candidates: Sequence[Candidate]) -> Candidate:
    """Return modules of one size that give equally many units, as a module of all their units and scaled errors."""
    costs = tuple(
        sum(one.ranking.costs[index] / one.scale for one in candidates) for index in range(candidates[0].num_units)
    )
    return Candidate(
        layer=0,
        ranking=Ranking(tuple(range(len(costs))), costs),
        unit_parameters=sum(one.unit_parameters for one in candidates),
        bias_parameters=sum(one.bias_parameters for one in candidates),
        output_variance=1.0,
        stream_power=1.0,
    )


def spend_by_error(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove where the squared error per parameter is least, in units that compare across modules.

    A module's errors are divided by (E|h|^2)^.75 (tr W^T C W)^.25, the residual stream's power weighed against the
    module's own. The first alone lets modules that hardly add to the stream go at once, the second alone spares
    them whatever they matter; of the powers tried, .75 was the best over all models (docs/method.md).
    """

    def price(candidate: Candidate, num_removed: int) -> float:
        return candidate.ranking.costs[num_removed] / candidate.unit_parameters / candidate.scale

    return spend_by_price(candidates, target, price)


def spend_by_standard_score(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove the units of lowest cost, each module's costs standardised to mean 0 and deviation 1 (FLAP)."""
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
    """Remove a fraction that grows with the logarithm of the depth, the first layer's the least (SlimGPT)."""
    shares = [math.log(2 + candidate.layer) for candidate in candidates]
    return _spend_by_shares(candidates, target, shares)


def spend_by_price(candidates: Sequence[Candidate], target: int, price: Callable[[Candidate, int], float]) -> list[int]:
    """Remove the cheapest next unit of any module until the target is met.

    A unit that would overshoot is passed over, and with it the rest of its module: smaller ones fill what is left.
    """
    removed = [0] * len(candidates)
    queue = [(price(candidate, 0), i) for i, candidate in enumerate(candidates) if candidate.num_units > 1]
    heapq.heapify(queue)
    missing = target
    while queue:
        _, i = heapq.heappop(queue)
        missing -= (gain := _next_gain(candidates[i], removed[i], missing))
        removed[i] += gain > 0
        if gain and removed[i] < candidates[i].num_units - 1:
            heapq.heappush(queue, (price(candidates[i], removed[i]), i))
    _require_spent(candidates, removed, missing)
    return removed


def _spend_by_shares(candidates: Sequence[Candidate], target: int, shares: Sequence[float]) -> list[int]:
    """Remove fractions proportional to shares; what rounding leaves is filled by single units, in turn."""
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
            if removed[i] < candidate.num_units - 1 and (gain := _next_gain(candidate, removed[i], missing)):
                removed[i], missing, given = removed[i] + 1, missing - gain, True
    _require_spent(candidates, removed, missing)
    return removed


def _next_gain(candidate: Candidate, num_removed: int, missing: int) -> int:
    """Return what the next unit saves, 0 where that is more than what is missing."""
    gain = candidate.removed_parameters(num_removed + 1) - candidate.removed_parameters(num_removed)
    return gain if 0 < gain <= missing else 0


def _rounded(candidates: Sequence[Candidate], shares: Sequence[float], ratio: float) -> list[int]:
    return [
        min(int(ratio * share * candidate.num_units), candidate.num_units - 1)
        for candidate, share in zip(candidates, shares, strict=True)
    ]


def _removed(candidates: Sequence[Candidate], removed: Sequence[int]) -> int:
    return sum(candidate.removed_parameters(count) for candidate, count in zip(candidates, removed, strict=True))


def _require_spent(candidates: Sequence[Candidate], removed: Sequence[int], missing: int) -> None:
    """Raise where modules could not give so much; what is less than a unit of those that still have some is left."""
    target = _removed(candidates, removed) + missing
    most = _removed(candidates, [candidate.num_units - 1 for candidate in candidates])
    if target <= most or missing < min(candidate.unit_parameters for candidate in candidates):
        return
    raise InputError(
        f"{target:,} parameters were to go, but with one head (KV group) and one "
        f"channel left in every layer {most:,} can: ask for a lower sparsity"
    )
