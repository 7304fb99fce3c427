r"""What is decided of a mixture of experts: the channels that each keeps, from the tokens that were sent to it.

Every expert is an MLP like any other, over its own tokens: X_e, its routing weight multiplied in, and W_e are all that
ranking and recovery see, and the methods are the same functions. Four things differ:

- the experts' weights lie in one tensor, so that each gives as many channels as the others, though not the same ones: a
  ranking of all takes one of each at a time, expert after expert;
- an error per token of expert e counts n_e / N, the fraction of the tokens that reach it, so that the sum over the
  experts is the squared error per token of the stream;
- an expert has no bias, and gets none: lines and fits go through zero, by moments about zero;
- an expert that no calibration token was sent to has no moments. It loses the channels of the smallest weights, at no
  cost, and what it keeps stays as it is.

Shapes: E experts, I channels of each, S of them kept, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from slimllm_ops.decide.channels import channel_scores, drop_lowest
from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.plan import Decision, Recovery
from slimllm_ops.decide.recovery import Line, fit_line
from slimllm_ops.errors import SolveError
from slimllm_ops.models.families import Branch
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking
from slimllm_ops.moments.routing import PackedExperts


@dataclass(frozen=True)
class _Fitted:
    """What one expert becomes: its kept channels, their new weights or scales, and what that leaves unexplained."""

    kept: tuple[int, ...]
    recovered: Tensor
    relative_error: float = 0.0
    # Of its output, per token of the stream.
    power: float = 0.0


@torch.inference_mode()
def rank_experts(
    weight_EDI: Tensor, observed: PackedExperts, rank: Callable[[Projection, int], Ranking], described: str
) -> tuple[Ranking, float]:
    """Return the order in which channels go, one of each expert at a time, and the power of the experts' outputs.

    Args:
        weight_EDI: the experts' output weights, on the device to compute on.
        observed: their moments.
        rank: ranks the units of one output projection.
        described: the layer and module, for errors.

    Raises:
        SolveError: an expert's moments cannot be inverted; the message names it.
    """
    rankings, power = [], 0.0
    for expert, weight_DI in enumerate(weight_EDI):
        projection = _projection(weight_DI, observed, expert)
        if projection is None:
            rankings.append(_rank_idle(weight_DI))
            continue
        share = observed.gain * observed.share(expert)
        with _named(described, expert):
            rankings.append(rank(projection, len(projection.weight_PD)).scaled(share))
        power += share * float(projection.variance_D.sum())
    return _in_turn(rankings), power


@torch.inference_mode()
def refit_experts(
    weight_EDI: Tensor,
    observed: PackedExperts,
    recover: Callable[[Projection, Tensor], Recovery],
    ranking: Ranking,
    removals: Sequence[int],
    described: str,
) -> list[Decision | None]:
    """Return the decision at each number of channels removed from all experts together; None where none is.

    Args:
        weight_EDI: the experts' output weights, on the device to compute on.
        observed: their moments.
        recover: what recovers the output of one output projection.
        ranking: the order in which channels go.
        removals: numbers of channels to remove, as many of each expert.
        described: the layer and module, for errors.

    Raises:
        SolveError: an expert's kept inputs cannot be factorised; the message names it.
    """
    num_experts, _, num_channels = weight_EDI.shape
    kept = {number: _by_expert(ranking.kept_after(number), num_experts, num_channels) for number in removals if number}
    fitted: dict[int, list[_Fitted]] = {number: [] for number in kept}
    # One expert's moments at a time, and all its decisions from them.
    for expert, weight_DI in enumerate(weight_EDI):
        projection = _projection(weight_DI, observed, expert)
        for number, channels in kept.items():
            with _named(described, expert):
                fitted[number].append(_refit(weight_DI, projection, recover, channels[expert], observed.share(expert)))
    decisions: list[Decision | None] = []
    for number in removals:
        if not number:
            decisions.append(None)
            continue
        weight_SD = torch.cat([one.recovered for one in fitted[number]])
        recovery = Refit(weight_SD, torch.zeros_like(weight_SD[0]), _relative_error(fitted[number]))
        decisions.append(_decided(fitted[number], num_channels, ranking.scores(), recovery.cpu(), observed))
    return decisions


@torch.inference_mode()
def choose_expert_channels(
    weights: dict[str, Tensor], branch: Branch, observed: PackedExperts, *, num_removed: int, keep_lowest: float
) -> Decision:
    """Choose the channels of every expert that stay as the paper does, and the lines that recover each one's output.

    Args:
        weights: the layer's tensors by their names in it, on the device to compute on.
        branch: the MLP.
        observed: the experts' merged moments.
        num_removed: how many channels each expert is to lose.
        keep_lowest: the fraction of an expert's channels of lowest score that stay.
    """
    weight_EDI = weights[branch.output_weight]
    inputs_EID = [part for name in branch.input_weights for part in weights[name].split(weight_EDI.shape[2], dim=1)]
    scores: list[float] = []
    fitted: list[_Fitted] = []
    for expert, weight_DI in enumerate(weight_EDI):
        projection = _projection(weight_DI, observed, expert)
        inputs_ID = [part_EID[expert] for part_EID in inputs_EID]
        scores_I = _score(weight_DI, projection, inputs_ID, observed, expert)
        kept = drop_lowest(scores_I, num_removed, keep_lowest)
        fitted.append(_fit_line(weight_DI, projection, kept, observed.share(expert)))
        scores += scores_I.tolist()
    scale_ED = torch.stack([one.recovered.double().cpu() for one in fitted])
    line = Line(scale_ED, torch.zeros_like(scale_ED[0]), _relative_error(fitted))
    return _decided(fitted, weight_EDI.shape[2], tuple(scores), line, observed)


def _projection(weight_DI: Tensor, observed: PackedExperts, expert: int) -> Projection | None:
    """Return an expert's output projection over its own tokens, through zero; None where it has none."""
    seen = observed.experts[expert]
    return None if seen is None else Projection.of(seen.unpack(weight_DI.device, with_bias=False).moments, weight_DI)


def _rank_idle(weight_DI: Tensor) -> Ranking:
    """Rank the channels of an expert without tokens by the norm of their weights, at no cost."""
    by_norm = Ranking.by_score(weight_DI.norm(dim=0).cpu())
    return Ranking(by_norm.order, (0.0,) * len(by_norm.order))


def _in_turn(rankings: Sequence[Ranking]) -> Ranking:
    """Return the ranking that takes one channel of each expert at a time, each in its own order."""
    steps = list(zip(*(ranking.order for ranking in rankings), strict=True))
    costs = zip(*(ranking.costs for ranking in rankings), strict=True)
    order = (expert * len(steps) + channel for step in steps for expert, channel in enumerate(step))
    return Ranking(tuple(order), tuple(cost for step in costs for cost in step))


def _by_expert(kept: Sequence[int], num_experts: int, num_channels: int) -> list[tuple[int, ...]]:
    """Return which of its channels each expert keeps, of all kept ones, ascending and as many of each."""
    size = len(kept) // num_experts
    return [tuple(unit % num_channels for unit in kept[start : start + size]) for start in range(0, len(kept), size)]


def _refit(
    weight_DI: Tensor,
    projection: Projection | None,
    recover: Callable[[Projection, Tensor], Recovery],
    kept: tuple[int, ...],
    share: float,
) -> _Fitted:
    """Recover what an expert keeps; `share` is the fraction of the tokens that reach it."""
    kept_S = torch.tensor(kept, device=weight_DI.device)
    weight_SD = weight_DI.T[kept_S]
    if projection is None:
        return _Fitted(kept, weight_SD.float())
    recovery = recover(projection, kept_S)
    # Rounded as a refit is, so that what is held of all experts is no more than the layer.
    recovered_SD = recovery.restore(weight_SD.to(projection.weight_PD)).float()
    return _Fitted(kept, recovered_SD, recovery.relative_error, share * float(projection.variance_D.sum()))


def _fit_line(weight_DI: Tensor, projection: Projection | None, kept: tuple[int, ...], share: float) -> _Fitted:
    if projection is None:
        return _Fitted(kept, torch.ones_like(weight_DI[:, 0]))
    line = fit_line(projection, torch.tensor(kept, device=weight_DI.device))
    return _Fitted(kept, line.scale_D, line.relative_error, share * float(projection.variance_D.sum()))


def _score(
    weight_DI: Tensor, projection: Projection | None, inputs_ID: list[Tensor], observed: PackedExperts, expert: int
) -> Tensor:
    """Return the paper's score of an expert's channels, shape (I,); of its weights alone, where it has no tokens."""
    seen = observed.experts[expert]
    if projection is None or seen is None:
        norms_I = [weight_ID.float().norm(dim=1) for weight_ID in inputs_ID]
        return sum(norms_I, start=weight_DI.float().norm(dim=0))
    input_norm_D = torch.from_numpy(seen.input_squares_D.copy()).to(weight_DI.device).sqrt()
    return channel_scores(projection, input_norm_D, inputs_ID)


def _relative_error(fitted: Sequence[_Fitted]) -> float:
    """Return what all experts together leave unexplained of the power of their outputs."""
    total = sum(one.power for one in fitted)
    return sum(one.relative_error * one.power for one in fitted) / total if total > 0 else 0.0


def _decided(
    fitted: Sequence[_Fitted], num_channels: int, scores: tuple[float, ...], recovery: Recovery, observed: PackedExperts
) -> Decision:
    kept = tuple(expert * num_channels + channel for expert, one in enumerate(fitted) for channel in one.kept)
    return Decision(kept, scores, recovery, recovery.relative_error, with_bias=False, idle_experts=observed.idle)


@contextmanager
def _named(described: str, expert: int) -> Iterator[None]:
    """Let an error of a solve say which expert it is of."""
    try:
        yield
    except SolveError as error:
        raise SolveError(f"{described}, expert {expert}: {error}") from None
