"""What is done with a module's moments once they are merged: rank its units, then decide at any number of them.

The functions are pure and read nothing but their arguments, so they run wherever there is a free processor.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.layer_ratios import LayerSize
from slimllm_ops.decide.elimination import eliminate
from slimllm_ops.decide.experts import join_refits
from slimllm_ops.decide.parts import Fit, fit_part, rank_part
from slimllm_ops.decide.paths import LayerPaths, ModulePath
from slimllm_ops.decide.plan import Decision
from slimllm_ops.methods import Method
from slimllm_ops.moments.observation import Observed
from slimllm_ops.moments.ranking import Ranking


@torch.inference_mode()
def eliminate_module(weight: Tensor, observed: Observed, num_units: int) -> ModulePath:
    """Return gram's elimination path of a module, and the variance of its output, both as the stream sees them.

    Args:
        weight: The output projection's weight (D, P), on the device to compute on; that of experts is (E, D, P).
        observed: The module's merged observation.
        num_units: How many units each part's inputs make.

    Raises:
        SolveError: The moments cannot be inverted.
    """
    rankings, variance = [], 0.0
    for part in observed.parts(weight):
        counts = observed.gain * part.share
        rankings.append(rank_part(part, num_units, eliminate).scaled(counts))
        variance += counts * part.output_variance
    return ModulePath(Ranking.in_turn(rankings), variance)


@torch.inference_mode()
def rank_module(weight: Tensor, observed: Observed, num_units: int, method: Method) -> Ranking:
    """Return the order in which a method removes a module's units, at costs as the stream sees them.

    Args:
        weight: The output projection's weight (D, P), on the device to compute on; that of experts is (E, D, P).
        observed: The module's merged observation.
        num_units: How many units each part's inputs make.
        method: Ranks the units.

    Raises:
        SolveError: The moments cannot be inverted.
    """
    return Ranking.in_turn(
        [rank_part(part, num_units, method.rank).scaled(observed.gain * part.share) for part in observed.parts(weight)]
    )


@torch.inference_mode()
def decide_module(
    weight: Tensor, observed: Observed, method: Method, ranking: Ranking, removals: Sequence[int]
) -> list[Decision | None]:
    """Return the decision at each number of units removed; None where none is.

    Args:
        weight: The output projection's weight (D, P), on the device to compute on; that of experts is (E, D, P).
        observed: The module's merged observation.
        method: Recovers the rest.
        ranking: The order in which units go.
        removals: Numbers of units to remove from the whole module.

    Raises:
        SolveError: The kept inputs' moments cannot be factorised.
    """
    if not any(removals):
        return [None] * len(removals)
    weights_DP, scores = observed.split(weight), ranking.scores()
    size = len(scores) // len(weights_DP)
    kept = {number: _by_part(ranking.kept_after(number), size, len(weights_DP)) for number in removals if number}
    fits: dict[int, list[Fit]] = {number: [] for number in kept}
    # One part's moments at a time, and all its fits from them.
    for index, part in enumerate(observed.parts(weight)):
        part_scores = scores[index * size : (index + 1) * size]
        for number, parts in kept.items():
            fits[number].append(fit_part(part, parts[index], part_scores, method.recover))
    join = partial(join_refits, weights_DP)
    return [observed.joined(fits[number], join).decision(observed) if number else None for number in removals]


def _by_part(kept: Sequence[int], size: int, num_parts: int) -> list[tuple[int, ...]]:
    """Return which of its own units each part keeps, from the kept units of all parts, ascending."""
    return [tuple(unit % size for unit in kept if unit // size == part) for part in range(num_parts)]


def candidates_of(
    sizes: Sequence[LayerSize], paths: Sequence[LayerPaths], rankings: Sequence[Sequence[Ranking]]
) -> list[Candidate]:
    """Return what every module can give, layer by layer, attention before the MLP.

    Args:
        sizes: what each layer is made of.
        paths: what the pass left of each layer.
        rankings: of each layer, the order in which a method removes its heads, and its channels.
    """
    candidates = []
    for layer, (size, path, (attention, mlp)) in enumerate(zip(sizes, paths, rankings, strict=True)):
        modules = (
            (attention, size.unit_parameters, size.attention_bias_parameters, path.attention.output_variance, 1),
            (
                mlp,
                size.channel_parameters // size.num_experts,
                size.mlp_bias_parameters,
                path.mlp.output_variance,
                size.num_experts,
            ),
        )
        candidates += [
            Candidate(
                layer=layer,
                ranking=ranking,
                unit_parameters=unit_parameters,
                bias_parameters=bias_parameters,
                output_variance=output_variance,
                stream_power=path.stream_power,
                units_at_once=units_at_once,
            )
            for ranking, unit_parameters, bias_parameters, output_variance, units_at_once in modules
        ]
    return candidates
