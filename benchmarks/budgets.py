"""Budgets that `gram` could have: the same elimination and recovery, with other scales of errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.comparison.contestants import Contestant, one_pass
from slimllm_ops.allocate.budget import Candidate, cost_per_parameter, spend_by_price, spend_evenly
from slimllm_ops.methods import METHODS, eliminate_by_squared_error

Spend = Callable[[Sequence[Candidate], int], list[int]]

# What a module's errors are divided by.
SCALES: dict[str, Callable[[Candidate], float]] = {
    "the output's variance, tr(W^T C W)": lambda one: one.output_variance,
    "the stream's power, E abs(h)^2": lambda one: one.stream_power,
    "the geometric mean of the two": lambda one: math.sqrt(one.output_variance * one.stream_power),
    "the stream's and the output's to the powers of .75 and .25": lambda one: (
        one.stream_power**0.75 * one.output_variance**0.25
    ),
}


def gram_that_spends(spend: Spend) -> Contestant:
    """Return `gram` with another budget, which counts squared errors as they are."""
    return one_pass(replace(METHODS["gram"], rank=eliminate_by_squared_error, spend=spend))


def spend_by_scale(scale: Callable[[Candidate], float]) -> Spend:
    """Return a budget by the error per parameter, divided by a scale."""

    def price(candidate: Candidate, num_removed: int) -> float:
        return cost_per_parameter(candidate, num_removed) / max(scale(candidate), 1e-300)

    return lambda candidates, target: spend_by_price(candidates, target, price)


def spend_on_channels_evenly(candidates: Sequence[Candidate], target: int) -> list[int]:
    """Remove the same fraction of every MLP's channels, and no head."""
    removed = [0] * len(candidates)
    removed[1::2] = spend_evenly(candidates[1::2], target)
    return removed
