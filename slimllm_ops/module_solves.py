"""Solves a module from its merged moments: ranks its units, then decides which stay at any number of removals.

The functions are pure and read only their arguments, so they can run wherever a processor is free.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.decide.elimination import eliminate
from slimllm_ops.decide.experts import join_refits
from slimllm_ops.decide.parts import Fit, fit_part, rank_part
from slimllm_ops.decide.paths import ModulePath
from slimllm_ops.decide.plan import Decision
from slimllm_ops.methods import Method
from slimllm_ops.moments.moments import accumulation_dtype
from slimllm_ops.moments.observation import Observed
from slimllm_ops.moments.projection import Fisher
from slimllm_ops.moments.ranking import Ranking
from slimllm_ops.moments.sums import DensePass


@torch.inference_mode()
def eliminate_module(weight: Tensor, observed: Observed, num_units: int, fisher_DD: np.ndarray | None) -> ModulePath:
    """Return gram's elimination path and output variance of a module, per token of the stream.

    Args:
        weight: The output projection's weight on the device to compute on: (D, P), or (E, D, P) with experts.
        observed: The module's merged observation.
        num_units: The number of units in each part.
        fisher_DD: The Fisher information of the module's output; None to count squared errors.

    Raises:
        SolveError: The moments cannot be inverted.
    """
    rankings, variance, fisher = [], 0.0, _fisher(fisher_DD, weight)
    for part in observed.parts(weight):
        rankings.append(rank_part(part, num_units, eliminate, fisher).scaled(part.share))
        variance += part.share * part.output_variance
    return ModulePath(Ranking.in_turn(rankings), variance)


@torch.inference_mode()
def rank_module(
    weight: Tensor, observed: Observed, num_units: int, fisher_DD: np.ndarray | None, method: Method
) -> Ranking:
    """Return a method's ranking of a module's units, with costs per token of the stream.

    Args:
        weight: The output projection's weight on the device to compute on: (D, P), or (E, D, P) with experts.
        observed: The module's merged observation.
        num_units: The number of units in each part.
        fisher_DD: The Fisher information of the module's output; None to count squared errors.
        method: The method that ranks the units.

    Raises:
        SolveError: The moments cannot be inverted.
    """
    fisher = _fisher(fisher_DD, weight)
    return Ranking.in_turn(
        [rank_part(part, num_units, method.rank, fisher).scaled(part.share) for part in observed.parts(weight)]
    )


@torch.inference_mode()
def decide_module(
    weight: Tensor, observed: Observed, method: Method, ranking: Ranking, removals: Sequence[int]
) -> list[Decision | None]:
    """Return the decision for each number of removed units; None for zero.

    Args:
        weight: The output projection's weight on the device to compute on: (D, P), or (E, D, P) with experts.
        observed: The module's merged observation.
        method: The method that recovers the output.
        ranking: The order in which units are removed.
        removals: The numbers of units to remove from the whole module.

    Raises:
        SolveError: The kept inputs' moments cannot be factorised.
    """
    if not any(removals):
        return [None] * len(removals)
    weights_DP, scores = observed.split(weight), ranking.scores()
    size = len(scores) // len(weights_DP)
    kept = {number: _by_part(ranking.kept_after(number), size, len(weights_DP)) for number in removals if number}
    fits: dict[int, list[Fit]] = {number: [] for number in kept}
    # Unpack one part's moments at a time, and make all its fits from them.
    for index, part in enumerate(observed.parts(weight)):
        part_scores = scores[index * size : (index + 1) * size]
        for number, parts in kept.items():
            fits[number].append(fit_part(part, parts[index], part_scores, method.recover))
    join = partial(join_refits, weights_DP)
    return [observed.joined(fits[number], join).decision(observed) if number else None for number in removals]


def _fisher(matrix_DD: np.ndarray | None, weight: Tensor) -> Fisher | None:
    """Return the Fisher information on the weight's device, in the dtype of moments."""
    if matrix_DD is None:
        return None
    device = weight.device
    return Fisher(torch.from_numpy(matrix_DD.copy()).to(device, accumulation_dtype(device)))


def _by_part(kept: Sequence[int], size: int, num_parts: int) -> list[tuple[int, ...]]:
    """Split the kept units of a module by part, numbered within each part, ascending."""
    return [tuple(unit % size for unit in kept if unit // size == part) for part in range(num_parts)]


def eliminate_observed(weight: Tensor, seen: DensePass, num_units: int, fisher_DD: np.ndarray | None) -> ModulePath:
    """Return gram's elimination path of a module observed in a pass of the dense model; see `eliminate_module`."""
    return eliminate_module(weight, seen.observed, num_units, fisher_DD)
