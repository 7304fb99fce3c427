"""What is done with a module's moments once they are merged: rank its units, then decide at any number of them.

Both functions are pure and read nothing but their arguments, so they run wherever there is a free processor.
"""

import torch
from torch import Tensor

from slimllm_ops.elimination import eliminate
from slimllm_ops.errors import SolveError
from slimllm_ops.methods import Method
from slimllm_ops.observation import PackedObservation
from slimllm_ops.plan import Decision, unit_rows
from slimllm_ops.projection import Projection
from slimllm_ops.ranking import Ranking


@torch.inference_mode()
def eliminate_module(
    weight_DP: Tensor, observed: PackedObservation, num_units: int, described: str
) -> tuple[Ranking, float]:
    """Return gram's elimination path of a module, and the variance of its output.

    Args:
        weight_DP: the output projection's weight, on the device to compute on.
        observed: its moments.
        num_units: how many units its inputs make.
        described: the layer and module, for errors.

    Raises:
        SolveError: the moments cannot be inverted.
    """
    projection = Projection.of(observed.unpack(weight_DP.device).moments, weight_DP)
    try:
        ranking = eliminate(projection, num_units)
    except SolveError as error:
        raise SolveError(f"{described}: {error}") from None
    return ranking, float(projection.variance_D.sum())


@torch.inference_mode()
def rank_module(weight_DP: Tensor, observed: PackedObservation, num_units: int, method: Method) -> Ranking:
    """Return the order in which a method removes a module's units."""
    projection = Projection.of(observed.unpack(weight_DP.device).moments, weight_DP)
    return method.rank(projection, num_units)


@torch.inference_mode()
def decide_module(
    weight_DP: Tensor,
    observed: PackedObservation,
    method: Method,
    ranking: Ranking,
    removals: list[int],
    described: str,
) -> list[Decision | None]:
    """Return the decision at each number of units removed; None where none is.

    Args:
        weight_DP: the output projection's weight, on the device to compute on.
        observed: its moments.
        method: how the rest is recovered.
        ranking: the order in which units go.
        removals: numbers of units to remove.
        described: the layer and module, for errors.

    Raises:
        SolveError: the kept inputs' moments cannot be factorised.
    """
    projection = Projection.of(observed.unpack(weight_DP.device).moments, weight_DP)
    decisions: list[Decision | None] = []
    for num_removed in removals:
        if not num_removed:
            decisions.append(None)
            continue
        kept = ranking.kept_after(num_removed)
        kept_S = unit_rows(kept, len(ranking.order), weight_DP.shape[1]).to(weight_DP.device)
        try:
            recovery = method.recover(projection, kept_S)
        except SolveError as error:
            raise SolveError(f"{described}: {error}") from None
        decisions.append(Decision(kept, ranking.scores(), recovery.cpu(), recovery.relative_error))
    return decisions
