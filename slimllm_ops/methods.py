"""Defines the one-pass methods, as small functions from a module's moments and weights to a decision.

A method ranks the units of every module, spends a budget over all modules, and recovers the output from the kept units.
All methods use the same moments of the dense model, so one pass over the calibration data serves any number of methods
and sparsities. To add one, write its three functions and a row in `METHODS` (docs/methods.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimllm_ops.allocate.budget import (
    Candidate,
    spend_by_cost,
    spend_by_depth,
    spend_by_relative_error,
    spend_by_standard_score,
    spend_evenly,
)
from slimllm_ops.decide.elimination import eliminate, factorise_with_ridge, is_constant, ridge
from slimllm_ops.decide.least_squares import refit
from slimllm_ops.decide.plan import Recovery
from slimllm_ops.decide.recovery import Line
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking


@dataclass(frozen=True)
class Method:
    """A row of the table: how the method ranks, spends and recovers, where it is from, and how ours differs."""

    name: str
    rank: Callable[[Projection, int], Ranking]
    spend: Callable[[Sequence[Candidate], int], list[int]]
    recover: Callable[[Projection, Tensor], Recovery]
    source: str
    differs: str


def eliminate_by_squared_error(projection: Projection, num_units: int) -> Ranking:
    """Rank units by elimination, where squared errors of the output count as they are, as in ZipLM and SlimGPT."""
    return eliminate(replace(projection, fisher=None), num_units)


def rank_by_leverage(projection: Projection, num_units: int) -> Ranking:
    """Score inputs by their ridge leverage, diag(C (C + d I)^-1) with C = E x x^T, and heads by their inputs' mean.

    MoDeGPT, section 3.2: the inputs of the best Nyström approximation of C. d is the ridge of `refit`.

    Raises:
        SolveError: C + d I cannot be factorised.
    """
    second_PP = projection.moments.about_zero().covariance_PP
    if is_constant(second_PP):
        return _by_unit(torch.zeros_like(second_PP[0]), num_units)
    d = ridge(second_PP)
    inverse_PP = torch.cholesky_inverse(factorise_with_ridge(second_PP, d))
    return _by_unit(1 - d * inverse_PP.diagonal(), num_units)


def rank_by_fluctuation(projection: Projection, num_units: int) -> Ranking:
    """Score inputs by var(X_c) ||W_c||^2, FLAP's weighted input fluctuation, and heads by the mean of their inputs."""
    variance_P = projection.covariance_PP.diagonal()
    return _by_unit(variance_P * projection.weight_PD.square().sum(dim=1), num_units)


def rank_by_wanda(projection: Projection, num_units: int) -> Ranking:
    """Score inputs by |X_c| sum_j |W_cj|, Wanda's metric summed over the outputs."""
    return _by_unit(projection.moments.norm_P * projection.weight_PD.abs().sum(dim=1), num_units)


def rank_by_magnitude(projection: Projection, num_units: int) -> Ranking:
    """Score inputs by the norm of their weights."""
    return _by_unit(projection.weight_PD.norm(dim=1), num_units)


def rank_at_random(projection: Projection, num_units: int) -> Ranking:
    """Rank units at random, with a seed from the weights, so that the same weights give the same ranking."""
    seed = int(projection.weight_PD.double().abs().sum().item() * 1e6) % 2**31
    return Ranking.by_score(torch.rand(num_units, generator=torch.Generator().manual_seed(seed)))


def compensate_mean(projection: Projection, kept_S: Tensor) -> Line:
    """Add the mean output of the removed inputs to the bias, as FLAP does, and leave the weights unchanged."""
    moments, weight_PD = projection.moments, projection.weight_PD
    bias_D = moments.mean_P @ weight_PD - moments.mean_P[kept_S] @ weight_PD[kept_S]
    return Line(torch.ones_like(bias_D), bias_D, _error_of_removal(projection, kept_S))


def leave(projection: Projection, kept_S: Tensor) -> Line:
    """Leave weights and bias unchanged: recover nothing."""
    zeros_D = torch.zeros_like(projection.weight_PD[0])
    return Line(torch.ones_like(zeros_D), zeros_D, _error_of_removal(projection, kept_S))


def _by_unit(scores_P: Tensor, num_units: int) -> Ranking:
    return Ranking.by_score(scores_P.unflatten(0, (num_units, -1)).mean(dim=1).cpu())


def _error_of_removal(projection: Projection, kept_S: Tensor) -> float:
    """Return the variance of the removed inputs' contribution, as a fraction of the output's variance."""
    removed_P = torch.ones(len(projection.weight_PD), dtype=torch.bool, device=kept_S.device)
    removed_P[kept_S] = False
    weight_RD = projection.weight_PD[removed_P]
    lost = (weight_RD * (projection.covariance_PP[removed_P][:, removed_P] @ weight_RD)).sum()
    total = float(projection.variance_D.sum())
    return float(lost) / total if total > 0 else 0.0


_HEADS = "whole heads (KV groups) and channels; moments of the dense model in one pass"

METHODS = {
    method.name: method
    for method in (
        Method(
            "gram",
            eliminate,
            spend_by_cost,
            refit,
            "slimllm: backward elimination, least squares, one budget by error",
            "",
        ),
        Method(
            "flap",
            rank_by_fluctuation,
            spend_by_standard_score,
            compensate_mean,
            "FLAP (An et al., AAAI 2024): WIFV metric, adaptive structure, bias compensation",
            _HEADS,
        ),
        Method(
            "fasp",
            rank_by_wanda,
            spend_evenly,
            refit,
            "FASP (Hu et al. 2025): Wanda-like column metric, least-squares restoration, uniform ratio",
            f"{_HEADS}, where FASP takes single rows of the values",
        ),
        Method(
            "ziplm",
            eliminate_by_squared_error,
            spend_by_relative_error,
            refit,
            "ZipLM (Kurtic et al., NeurIPS 2023): greedy brain-surgeon elimination, budget by relative errors",
            f"{_HEADS}, where ZipLM goes layer by layer and searches the budget",
        ),
        Method(
            "modegpt",
            rank_by_leverage,
            spend_evenly,
            refit,
            "MoDeGPT (Lin et al., ICLR 2025), type I: ridge leverage scores, Nyström reconstruction; uniform ratio",
            f"{_HEADS}, where MoDeGPT's types II and III compress dims of heads, and its ratio differs by layer",
        ),
        Method(
            "slimgpt",
            eliminate_by_squared_error,
            spend_by_depth,
            refit,
            "SlimGPT (Ling et al., NeurIPS 2024): greedy brain-surgeon elimination, ratio logarithmic in depth",
            f"{_HEADS}, where SlimGPT goes layer by layer",
        ),
        Method(
            "wanda-sp",
            rank_by_wanda,
            spend_evenly,
            leave,
            "Wanda-sp (Sun et al., ICLR 2024, structured as in FLAP): |W| |X| by column, uniform ratio",
            _HEADS,
        ),
        Method(
            "magnitude", rank_by_magnitude, spend_evenly, leave, "norm of the output weights, uniform ratio", _HEADS
        ),
        Method("random", rank_at_random, spend_evenly, leave, "units at random, uniform ratio", _HEADS),
    )
}
