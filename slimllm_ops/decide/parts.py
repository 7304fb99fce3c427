"""What each part of a module becomes, before the parts' fits are joined.

A plain module has one part. A mixture of experts has one per expert (`slimllm_ops.decide.experts`). Every part is an
output projection over its own tokens, so ranking and recovery are the same functions for both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimllm_ops.decide.plan import Decision, Recovery
from slimllm_ops.decide.recovery import Line
from slimllm_ops.models.families import unit_rows
from slimllm_ops.moments.observation import Observed, Part
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking

Rank = Callable[[Projection, int], Ranking]
Recover = Callable[[Projection, Tensor], Recovery]


@dataclass(frozen=True)
class Fit:
    """What a part of a module, or the whole module, becomes.

    Attributes:
        kept: The units that stay, ascending.
        scores: A score of every unit.
        recovery: What recovers the rest, in the driver's memory.
        power: The variance of the dense output, per token of the stream.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    recovery: Recovery
    power: float

    def decision(self, observed: Observed) -> Decision:
        """Return the decision of a module that was fitted from `observed`."""
        error = self.recovery.relative_error
        return Decision(self.kept, self.scores, self.recovery, error, observed.intercept, observed.idle)


def rank_part(part: Part, num_units: int, rank: Rank) -> Ranking:
    """Return the order in which a part's units go; the costs are per token of those that pass the part.

    A part without tokens loses the units of the smallest weights, at no cost.

    Raises:
        SolveError: The moments cannot be inverted.
    """
    if part.projection is None:
        by_norm = Ranking.by_score(part.weight_DP.norm(dim=0).cpu())
        return Ranking(by_norm.order, (0.0,) * len(by_norm.order))
    with part.named_in_errors():
        return rank(part.projection, num_units)


def fit_part(part: Part, kept: tuple[int, ...], scores: tuple[float, ...], recover: Recover) -> Fit:
    """Recover the rest of a part from the units that stay; without tokens, those stay as they are.

    Args:
        part: The part.
        kept: The units that stay, ascending.
        scores: A score of every unit.
        recover: Fits the kept inputs of a projection to its whole output.

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
