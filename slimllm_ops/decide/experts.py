r"""Joins the fits of a mixture's experts into the decision for one module.

Every expert is an MLP like any other, over its own tokens. Ranking and recovery see only X_e, which includes the
routing weight, and W_e, so the methods are the same functions. Four things differ:

- The experts' weights are one tensor, so every expert loses the same number of channels, though not the same ones. The
  joint ranking takes one channel of each expert in turn.
- An error per token of expert e is weighted by n_e / N, the fraction of tokens that reach it. The sum over the experts
  is then the squared error per token of the stream.
- An expert has no bias and gets none: its lines and fits go through zero, by moments about zero.
- An expert that received no calibration tokens has no moments. It loses the channels with the smallest weights, at no
  cost, and the channels that it keeps are unchanged.

Shapes: E experts, I channels per expert, S of them kept, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.parts import Fit
from slimllm_ops.decide.recovery import Line


def join_refits(weights_DI: Sequence[Tensor], fits: Sequence[Fit]) -> Fit:
    """Join the experts' fits into one, with their recovered weights concatenated.

    Args:
        weights_DI: Each expert's dense output weight.
        fits: Each expert's fit.
    """
    weight_SD = torch.cat([_recovered(*one) for one in zip(weights_DI, fits, strict=True)])
    return _joined(fits, Refit(weight_SD, torch.zeros_like(weight_SD[0]), _relative_error(fits)))


def join_lines(fits: Sequence[Fit]) -> Fit:
    """Join the experts' lines into one, with scales (E, D)."""
    scales_D = []
    for fit in fits:
        assert isinstance(fit.recovery, Line), "the paper's method recovers every part by a line"
        scales_D.append(fit.recovery.scale_D.double())
    scale_ED = torch.stack(scales_D)
    return _joined(fits, Line(scale_ED, torch.zeros_like(scale_ED[0]), _relative_error(fits)))


def _recovered(weight_DI: Tensor, fit: Fit) -> Tensor:
    """Return an expert's new weight (S, D), rounded to float32 like a refit."""
    weight_SD = weight_DI.cpu().T[list(fit.kept)]
    return fit.recovery.restore(weight_SD.double()).float()


def _joined(fits: Sequence[Fit], recovery: Line | Refit) -> Fit:
    size = len(fits[0].scores)
    kept = tuple(expert * size + channel for expert, fit in enumerate(fits) for channel in fit.kept)
    scores = tuple(score for fit in fits for score in fit.scores)
    return Fit(kept, scores, recovery, sum(fit.power for fit in fits))


def _relative_error(fits: Sequence[Fit]) -> float:
    """Return the unexplained fraction of the power of all experts' outputs."""
    total = sum(fit.power for fit in fits)
    return sum(fit.recovery.relative_error * fit.power for fit in fits) / total if total > 0 else 0.0
