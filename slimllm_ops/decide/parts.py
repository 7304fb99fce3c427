"""Ranks and fits each part of a module, before the parts' fits are joined.

A plain module has one part. A mixture of experts has one per expert (`slimllm_ops.decide.experts`). Every part is an
output projection over its own tokens, so both kinds use the same functions to rank and recover.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimllm_ops.decide.plan import Decision, Recovery
from slimllm_ops.decide.recovery import Line
from slimllm_ops.models.families import unit_rows
from slimllm_ops.moments.observation import Observed, Part
from slimllm_ops.moments.projection import Fisher, Projection
from slimllm_ops.moments.ranking import Ranking

Rank = Callable[[Projection, int], Ranking]
Recover = Callable[[Projection, Tensor], Recovery]


@dataclass(frozen=True)
class Fit:
    """The kept units and the recovery of a module, or of one of its parts.

    Attributes:
        kept: The units that stay, ascending.
        scores: The importance of every unit.
        recovery: The recovery of the output, in the driver's memory.
        power: The variance of the dense output, per token of the stream.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    recovery: Recovery
    power: float

    def decision(self, observed: Observed) -> Decision:
        """Return the decision for a module, from its fit to `observed`."""
        error = self.recovery.relative_error
        return Decision(self.kept, self.scores, self.recovery, error, observed.intercept, observed.idle)


def rank_part(part: Part, num_units: int, rank: Rank, fisher: Fisher | None) -> Ranking:
    """Rank a part's units; costs are per token that passes through the part.

    A part without tokens loses the units with the smallest weights, at no cost.

    Raises:
        SolveError: The moments cannot be inverted.
    """
    if part.projection is None:
        by_norm = Ranking.by_score(part.weight_DP.norm(dim=0).cpu())
        return Ranking(by_norm.order, (0.0,) * len(by_norm.order))
    with part.named_in_errors():
        return rank(replace(part.projection, fisher=fisher), num_units)


def fit_part(part: Part, kept: tuple[int, ...], scores: tuple[float, ...], recover: Recover) -> Fit:
    """Recover a part's output from the units that stay; without tokens, their weights are unchanged.

    Args:
        part: The part.
        kept: The units that stay, ascending.
        scores: The importance of every unit.
        recover: Function that fits the kept inputs of a projection to its full output.

    Raises:
        SolveError: The kept inputs' moments cannot be factorised.
    """
    if part.projection is None:
        ones_D = torch.ones_like(part.weight_DP[:, 0], device="cpu")
        return Fit(kept, scores, Line(ones_D, torch.zeros_like(ones_D), 0.0), 0.0)
    kept_S = unit_rows(kept, len(scores), part.weight_DP.shape[1]).to(part.weight_DP.device)
    with part.named_in_errors():
        recovery = recover(part.projection, kept_S)
    return Fit(kept, scores, recovery.cpu(), part.share * part.output_variance)
