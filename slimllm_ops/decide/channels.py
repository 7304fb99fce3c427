r"""Which MLP channels go: SlimLLM's score along the output's principal directions (paper, section 3.3).

The covariance of the MLP's output is W^T C W = V diag(lambda) V^T. With f = sigmoid(|lambda| / mean |lambda|),
and norms over tokens of the uncentred inputs, channel c scores

    score_c = sum_i || W_i[c] * |x_in| ||_2  +  |X_c| * || (W[c] V) * f ||_2

where the sum runs over the projections into the channel (gate and up), |x_in| (D,) is the per-feature norm of
the MLP's input, and |X_c| the norm of column c of the input of `down_proj`.

Shapes: P intermediate size, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimllm_ops.moments.projection import Projection


@dataclass(frozen=True)
class ChannelChoice:
    """The channels that stay, in ascending order, and each channel's score: the higher, the more important."""

    kept: tuple[int, ...]
    scores_P: Tensor


def choose_channels(
    projection: Projection,
    *,
    input_norm_D: Tensor,
    input_weights_PD: Sequence[Tensor],
    num_removed: int,
    keep_lowest: float,
) -> ChannelChoice:
    """Drop `num_removed` channels of low score, above a tail of the lowest that the published code keeps.

    Args:
        projection: `down_proj`.
        input_norm_D: l2 norm over tokens of each feature of the MLP's input.
        input_weights_PD: weights into the channels, as PyTorch has them (gate and up).
        num_removed: how many channels to remove, in [0, P - 1].
        keep_lowest: the fraction of channels of lowest score that stay (published: .01).
    """
    scores_P = channel_scores(projection, input_norm_D, input_weights_PD)
    return ChannelChoice(drop_lowest(scores_P, num_removed, keep_lowest), scores_P)


def drop_lowest(scores_P: Tensor, num_removed: int, keep_lowest: float) -> tuple[int, ...]:
    """Return the channels that stay, ascending, where those of low score go, above a tail of the lowest."""
    order = torch.argsort(scores_P, stable=True).tolist()
    # Where little is left, the tail gives way first: the highest score stays whatever goes.
    tail = min(round(keep_lowest * len(order)), len(order) - num_removed - 1)
    return tuple(sorted(order[:tail] + order[tail + num_removed :]))


def channel_scores(projection: Projection, input_norm_D: Tensor, input_weights_PD: Sequence[Tensor]) -> Tensor:
    """Return the score of every channel, shape (P,)."""
    weight_PD = projection.weight_PD
    eigenvalues_D, directions_DD = torch.linalg.eigh(weight_PD.T @ projection.image_PD)
    magnitude_D = eigenvalues_D.abs()
    mean = magnitude_D.mean()
    # An MLP with a constant output has no directions to prefer.
    importance_D = torch.sigmoid(magnitude_D / mean if mean > 0 else magnitude_D)
    output_P = projection.moments.norm_P * ((weight_PD @ directions_DD) * importance_D).norm(dim=1)
    norm_D = input_norm_D.to(weight_PD)
    inputs_P = [(input_PD.to(weight_PD) * norm_D).norm(dim=1) for input_PD in input_weights_PD]
    return sum(inputs_P, start=output_P)
