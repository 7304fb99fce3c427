"""A budget is spent exactly, within bounds, and where the rule says."""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest

from slimllm_ops.allocate.budget import (
    Candidate,
    spend_by_cost,
    spend_by_depth,
    spend_by_price,
    spend_by_standard_score,
    spend_evenly,
)
from slimllm_ops.errors import InputError
from slimllm_ops.models.pair import Pair
from slimllm_ops.moments.ranking import Ranking

T = TypeVar("T")
Spend = Callable[[Sequence[Candidate], int], list[int]]

RULES = (spend_by_cost, spend_by_standard_score, spend_evenly, spend_by_depth)
UNIT, CHANNEL, BIAS = 640, 48, 16


def model(seed: int, layers: int = 4, heads: int = 4, channels: int = 40) -> list[Candidate]:
    """Return random candidates: attention and MLP of every layer, with costs that rise as those of an elimination."""
    rng = np.random.default_rng(seed)
    candidates = []
    for layer in range(layers):
        for units, parameters in ((heads, UNIT), (channels, CHANNEL)):
            costs = np.sort(rng.gamma(1.0, 10.0 ** rng.normal(), size=units))
            candidates.append(
                Candidate(
                    layer=layer,
                    ranking=Ranking(tuple(rng.permutation(units).tolist()), tuple(costs.tolist())),
                    unit_parameters=parameters,
                    bias_parameters=BIAS,
                    output_variance=float(costs.sum() * rng.uniform(1, 2)),
                    stream_power=float(10 + 20 * layer),
                )
            )
    return candidates


def paired(values: Sequence[T]) -> list[Pair[T]]:
    """Return the values of each layer's modules as a pair."""
    return [Pair(attention, mlp) for attention, mlp in zip(values[0::2], values[1::2], strict=True)]


def flat(pairs: Iterable[Pair[T]]) -> list[T]:
    """Return the values of all modules, layer by layer."""
    return [value for pair in pairs for value in pair]


def spent(candidates: Sequence[Candidate], removed: Sequence[int]) -> int:
    """Return the parameters that removals save, a bias less for every module that gives any."""
    return sum(n * one.unit_parameters - (BIAS if n else 0) for one, n in zip(candidates, removed, strict=True))


@pytest.mark.parametrize("spend", RULES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.7])
def test_a_budget_is_met_to_within_the_smallest_unit(spend: Spend, seed: int, fraction: float) -> None:
    candidates = model(seed)
    target = int(fraction * sum(one.num_units * one.unit_parameters for one in candidates))
    removed = spend(candidates, target)
    assert 0 <= target - spent(candidates, removed) < CHANNEL
    assert all(0 <= n < one.num_units for one, n in zip(candidates, removed, strict=True))


@pytest.mark.parametrize("spend", RULES)
def test_all_but_one_unit_of_every_module_can_go_and_no_more(spend: Spend) -> None:
    candidates = model(0)
    most = spent(candidates, [one.num_units - 1 for one in candidates])
    assert spent(candidates, spend(candidates, most)) == most
    with pytest.raises(
        InputError, match=rf"{most + CHANNEL:,} parameters should be removed, but .* only {most:,} can be: ask for"
    ):
        spend(candidates, most + CHANNEL)


@pytest.mark.parametrize("spend", RULES)
def test_a_module_of_one_unit_keeps_it(spend: Spend) -> None:
    candidates = model(1, heads=1)
    removed = spend(candidates, 2000)
    assert removed[::2] == [0, 0, 0, 0]
    assert 0 <= 2000 - spent(candidates, removed) < CHANNEL


@pytest.mark.parametrize("spend", RULES)
def test_what_is_less_than_a_unit_of_those_that_can_go_is_left(spend: Spend) -> None:
    """Modules of one channel give none, however small: only heads can go, and they are large."""
    candidates = model(1, channels=1)
    removed = spend(candidates, 2 * UNIT + CHANNEL)
    assert spent(candidates, removed) in (2 * UNIT - BIAS, 2 * UNIT - 2 * BIAS)


@pytest.mark.parametrize("spend", RULES)
def test_nothing_is_removed_for_nothing(spend: Spend) -> None:
    assert spend(model(2), 0) == [0] * 8


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_next_unit_of_any_module_goes_first(seed: int) -> None:
    # Units of one size, and no biases, so that no unit is passed over.
    candidates = [replace(one, unit_parameters=10, bias_parameters=0) for one in model(seed)]
    offers = [(cost, i) for i, one in enumerate(candidates) for cost in one.ranking.costs[:-1]]
    cheapest = [i for _, i in heapq.nsmallest(60, offers)]
    removed = spend_by_price(candidates, 600, lambda one, n: one.ranking.costs[n])
    assert removed == [cheapest.count(i) for i in range(len(candidates))]


@pytest.mark.parametrize("seed", range(4))
def test_the_units_that_cost_least_per_parameter_go(seed: int) -> None:
    candidates = model(seed)
    removed = spend_by_cost(candidates, 3000)

    def price(one: Candidate, n: int) -> float:
        return one.ranking.costs[n] / one.unit_parameters

    assert removed == spend_by_price(candidates, 3000, price)
    # No channel that went was dearer than one that stayed elsewhere, but for the last few that fill what is left.
    last = [price(one, n - 2) for one, n in zip(candidates[1::2], removed[1::2], strict=True) if n > 1]
    following = [price(one, n) for one, n in zip(candidates[1::2], removed[1::2], strict=True) if n < one.num_units - 1]
    assert max(last) <= min(following)


@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_the_unit_of_measurement_does_not_matter(factor: float) -> None:
    candidates = model(3)
    scaled = [
        replace(
            one,
            ranking=Ranking(one.ranking.order, tuple(cost * factor for cost in one.ranking.costs)),
        )
        for one in candidates
    ]
    assert spend_by_cost(scaled, 3000) == spend_by_cost(candidates, 3000)


def test_standard_scores_look_past_a_module_s_level_and_spread() -> None:
    candidates = model(4)
    stretched = [
        replace(one, ranking=Ranking(one.ranking.order, tuple(7 * i + (i + 1) * cost for cost in one.ranking.costs)))
        for i, one in enumerate(candidates)
    ]
    assert spend_by_standard_score(stretched, 3000) == spend_by_standard_score(candidates, 3000)
    assert spend_by_cost(stretched, 3000) != spend_by_cost(candidates, 3000)


def test_modules_without_any_error_are_spent_first_and_break_nothing() -> None:
    candidates = model(5)
    nothing = Ranking(candidates[3].ranking.order, (0.0,) * candidates[3].num_units)
    candidates[3] = replace(candidates[3], ranking=nothing)
    for spend in (spend_by_cost, spend_by_standard_score):
        removed = spend(candidates, 3000)
        assert 0 <= 3000 - spent(candidates, removed) < CHANNEL
    assert spend_by_cost(candidates, 39 * CHANNEL - BIAS)[3] == 39


def test_even_shares_differ_by_a_unit_or_two() -> None:
    candidates = model(6)
    removed = spend_evenly(candidates, int(0.4 * sum(one.num_units * one.unit_parameters for one in candidates)))
    channels = removed[1::2]
    assert max(channels) - min(channels) <= 1
    assert all(abs(n / one.num_units - 0.4) < 1 / 4 for one, n in zip(candidates, removed, strict=True))


def test_shares_by_depth_follow_the_logarithm() -> None:
    candidates = model(7, layers=6, heads=50, channels=1000)
    removed = spend_by_depth(candidates, int(0.3 * sum(one.num_units * one.unit_parameters for one in candidates)))
    for start in (0, 1):
        counts = removed[start::2]
        assert counts == sorted(counts)
        for layer, n in enumerate(counts):
            assert n / counts[0] == pytest.approx(math.log(2 + layer) / math.log(2), rel=0.15)
