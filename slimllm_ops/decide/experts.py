r"""How the fits of a mixture's experts are joined into the decision of one module.

Every expert is an MLP like any other, over its own tokens: X_e, with its routing weight multiplied in, and W_e are all
that ranking and recovery see, and the methods are the same functions. Four things differ:

- the experts' weights lie in one tensor, so each expert gives as many channels as the others, but not the same ones: a
  ranking of all takes one channel of each expert in turn;
- an error per token of expert e counts n_e / N, the fraction of the tokens that reach it, so that the sum over the
  experts is the squared error per token of the stream;
- an expert has no bias, and gets none: lines and fits go through zero, by moments about zero;
- an expert that no calibration token was sent to has no moments. It loses the channels of the smallest weights, at no
  cost, and the channels that it keeps stay as they are.

Shapes: E experts, I channels of each, S of them kept, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.parts import Fit
from slimllm_ops.decide.recovery import Line


def join_refits(weights_DI: Sequence[Tensor], fits: Sequence[Fit]) -> Fit:
    """Join the experts' fits into one: their recovered weights, one after the other.

    Args:
        weights_DI: Each expert's dense output weight.
        fits: What each expert becomes.
    """
    weight_SD = torch.cat([_recovered(*one) for one in zip(weights_DI, fits, strict=True)])
    return _joined(fits, Refit(weight_SD, torch.zeros_like(weight_SD[0]), _relative_error(fits)))


def join_lines(fits: Sequence[Fit]) -> Fit:
    """Join the experts' lines into one that has a scale (E, D) for each of them."""
    scales_D = []
    for fit in fits:
        assert isinstance(fit.recovery, Line), "the paper's method recovers every part by a line"
        scales_D.append(fit.recovery.scale_D.double())
    scale_ED = torch.stack(scales_D)
    return _joined(fits, Line(scale_ED, torch.zeros_like(scale_ED[0]), _relative_error(fits)))


def _recovered(weight_DI: Tensor, fit: Fit) -> Tensor:
    """Return an expert's new weight (S, D), rounded as a refit is."""
    weight_SD = weight_DI.cpu().T[list(fit.kept)]
    return fit.recovery.restore(weight_SD.double()).float()


def _joined(fits: Sequence[Fit], recovery: Line | Refit) -> Fit:
    size = len(fits[0].scores)
    kept = tuple(expert * size + channel for expert, fit in enumerate(fits) for channel in fit.kept)
    scores = tuple(score for fit in fits for score in fit.scores)
    return Fit(kept, scores, recovery, sum(fit.power for fit in fits))


def _relative_error(fits: Sequence[Fit]) -> float:
    """Return what all experts together leave unexplained of the power of their outputs."""
    total = sum(fit.power for fit in fits)
    return sum(fit.recovery.relative_error * fit.power for fit in fits) / total if total > 0 else 0.0
