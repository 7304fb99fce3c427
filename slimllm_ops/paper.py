"""The `slimllm` method as published: what each module of a layer becomes, from one observation of it.

Both decisions run where the moments were merged and the layer's weights are at hand.
"""

import torch
from torch import Tensor

from slimllm_ops.channels import choose_channels
from slimllm_ops.families import Branch, unit_rows
from slimllm_ops.heads import choose_heads
from slimllm_ops.observation import Observation
from slimllm_ops.plan import Decision
from slimllm_ops.projection import Projection
from slimllm_ops.recovery import fit_line


@torch.inference_mode()
def decide_heads(
    weights: dict[str, Tensor], branch: Branch, observed: Observation, *, num_units: int, num_removed: int
) -> Decision:
    """Choose the KV groups of an attention that stay, and the line that recovers its output."""
    projection = Projection.of(observed.moments, weights[branch.output_weight])
    choice = choose_heads(projection, num_units=num_units, num_removed=num_removed)
    return _recover(projection, choice.kept, choice.scores_H)


@torch.inference_mode()
def decide_channels(
    weights: dict[str, Tensor], branch: Branch, observed: Observation, *, num_removed: int, keep_lowest: float
) -> Decision:
    """Choose the channels of an MLP that stay, and the line that recovers its output."""
    projection = Projection.of(observed.moments, weights[branch.output_weight])
    choice = choose_channels(
        projection,
        input_norm_D=observed.input_squares_D.sqrt(),
        input_weights_PD=[
            part for name in branch.input_weights for part in branch.unstack(weights[name], len(projection.weight_PD))
        ],
        num_removed=num_removed,
        keep_lowest=keep_lowest,
    )
    return _recover(projection, choice.kept, choice.scores_P)


def _recover(projection: Projection, kept: tuple[int, ...], scores: Tensor) -> Decision:
    kept_S = unit_rows(kept, len(scores), len(projection.weight_PD))
    line = fit_line(projection, kept_S.to(scores.device))
    return Decision(kept, tuple(scores.tolist()), line.cpu(), line.relative_error)
