"""What is done with a module's moments once they are merged: rank its units, then decide at any number of them.

The functions are pure and read nothing but their arguments, so they run wherever there is a free processor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.layer_ratios import LayerSize
from slimllm_ops.checkpoint.moment_store import LayerPaths
from slimllm_ops.decide.elimination import eliminate
from slimllm_ops.decide.experts import rank_experts, refit_experts
from slimllm_ops.decide.plan import Decision
from slimllm_ops.errors import SolveError
from slimllm_ops.methods import Method
from slimllm_ops.models.families import unit_rows
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking
from slimllm_ops.moments.routing import Observed, PackedExperts


@torch.inference_mode()
def eliminate_module(weight_DP: Tensor, observed: Observed, num_units: int, described: str) -> tuple[Ranking, float]:
    """Return gram's elimination path of a module, and the variance of its output, both as the stream sees them.

    Args:
        weight_DP: the output projection's weight, on the device to compute on; that of experts is (E, D, P).
        observed: its moments.
        num_units: how many units its inputs make.
        described: the layer and module, for errors.

    Raises:
        SolveError: the moments cannot be inverted.
    """
    if isinstance(observed, PackedExperts):
        return rank_experts(weight_DP, observed, eliminate, described)
    projection = Projection.of(observed.unpack(weight_DP.device).moments, weight_DP)
    try:
        ranking = eliminate(projection, num_units)
    except SolveError as error:
        raise SolveError(f"{described}: {error}") from None
    return ranking.scaled(observed.gain), observed.gain * float(projection.variance_D.sum())


@torch.inference_mode()
def rank_module(
    weight_DP: Tensor,
    observed: Observed,
    num_units: int,
    method: Method,
    with_bias: bool = True,
    described: str = "",
) -> Ranking:
    """Return the order in which a method removes a module's units, at costs as the stream sees them."""
    if isinstance(observed, PackedExperts):
        return rank_experts(weight_DP, observed, method.rank, described)[0]
    projection = Projection.of(observed.unpack(weight_DP.device, with_bias).moments, weight_DP)
    return method.rank(projection, num_units).scaled(observed.gain)


@torch.inference_mode()
def decide_module(
    weight_DP: Tensor,
    observed: Observed,
    method: Method,
    ranking: Ranking,
    removals: list[int],
    described: str,
    with_bias: bool = True,
) -> list[Decision | None]:
    """Return the decision at each number of units removed; None where none is.

    Args:
        weight_DP: the output projection's weight, on the device to compute on; that of experts is (E, D, P).
        observed: its moments.
        method: how the rest is recovered.
        ranking: the order in which units go.
        removals: numbers of units to remove.
        described: the layer and module, for errors.
        with_bias: whether recovery has an intercept.

    Raises:
        SolveError: the kept inputs' moments cannot be factorised.
    """
    if not any(removals):
        return [None] * len(removals)
    if isinstance(observed, PackedExperts):
        return refit_experts(weight_DP, observed, method.recover, ranking, removals, described)
    projection = Projection.of(observed.unpack(weight_DP.device, with_bias).moments, weight_DP)
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
        decisions.append(Decision(kept, ranking.scores(), recovery.cpu(), recovery.relative_error, with_bias))
    return decisions


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
