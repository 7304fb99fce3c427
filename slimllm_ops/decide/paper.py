"""The `slimllm` method as published: what each module of a layer becomes, from one observation of it.

Both decisions run where the moments were merged and the layer's weights are at hand.
"""

import torch
from torch import Tensor

from slimllm_ops.decide.channels import choose_channels
from slimllm_ops.decide.experts import choose_expert_channels
from slimllm_ops.decide.heads import choose_heads
from slimllm_ops.decide.plan import Decision
from slimllm_ops.decide.recovery import fit_line
from slimllm_ops.models.families import Branch, unit_rows
from slimllm_ops.moments.observation import PackedObservation
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.routing import Observed, PackedExperts


@torch.inference_mode()
def decide_heads(
    weights: dict[str, Tensor],
    branch: Branch,
    observed: PackedObservation,
    *,
    num_units: int,
    num_removed: int,
    with_bias: bool = True,
) -> Decision:
    """Choose the KV groups of an attention that stay, and the line that recovers its output.

    Args:
        weights: the layer's tensors by their names in it, on the device to compute on.
        branch: the attention.
        observed: its merged moments.
        num_units: number of KV groups.
        num_removed: how many of them to remove.
        with_bias: whether the lines have an intercept.
    """
    weight_DP = weights[branch.output_weight]
    projection = Projection.of(observed.unpack(weight_DP.device, with_bias).moments, weight_DP)
    choice = choose_heads(projection, num_units=num_units, num_removed=num_removed)
    return _recover(projection, choice.kept, choice.scores_H, with_bias)


@torch.inference_mode()
def decide_channels(
    weights: dict[str, Tensor],
    branch: Branch,
    observed: Observed,
    *,
    num_removed: int,
    keep_lowest: float,
    with_bias: bool = True,
) -> Decision:
    """Choose the channels of an MLP that stay, and the line that recovers its output; of its experts, each one's.

    Args:
        weights: the layer's tensors by their names in it, on the device to compute on.
        branch: the MLP.
        observed: its merged moments.
        num_removed: how many channels to remove, of each expert where there are some.
        keep_lowest: the fraction of channels of lowest score that stay.
        with_bias: whether the lines have an intercept, which those of experts never have.
    """
    if isinstance(observed, PackedExperts):
        return choose_expert_channels(weights, branch, observed, num_removed=num_removed, keep_lowest=keep_lowest)
    weight_DP = weights[branch.output_weight]
    unpacked = observed.unpack(weight_DP.device, with_bias)
    projection = Projection.of(unpacked.moments, weight_DP)
    choice = choose_channels(
        projection,
        input_norm_D=unpacked.input_squares_D.sqrt(),
        input_weights_PD=[
            part for name in branch.input_weights for part in branch.unstack(weights[name], len(projection.weight_PD))
        ],
        num_removed=num_removed,
        keep_lowest=keep_lowest,
    )
    return _recover(projection, choice.kept, choice.scores_P, with_bias)


def _recover(projection: Projection, kept: tuple[int, ...], scores: Tensor, with_bias: bool = True) -> Decision:
    kept_S = unit_rows(kept, len(scores), len(projection.weight_PD))
    line = fit_line(projection, kept_S.to(scores.device))
    return Decision(kept, tuple(scores.tolist()), line.cpu(), line.relative_error, with_bias)
