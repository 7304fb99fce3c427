r"""Chooses the MLP channels to remove by SlimLLM's score along the output's principal directions (paper, section 3.3).

The covariance of the MLP's output is W^T C W = V diag(lambda) V^T. With f = sigmoid(|lambda| / mean |lambda|),
and norms over tokens of the uncentred inputs, the score of channel c is

    score_c = sum_i || W_i[c] * |x_in| ||_2  +  |X_c| * || (W[c] V) * f ||_2

where the sum runs over the projections into the channel (gate and up), |x_in| (D,) is the per-feature norm of
the MLP's input, and |X_c| the norm of column c of the input of `down_proj`.

Shapes: P intermediate size, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelChoice:
    """The kept channels in ascending order, and every channel's score; a higher score is more important."""

    kept: tuple[int, ...]
    scores_P: Tensor


@dataclass(frozen=True)
class ChannelStatistics:
    """What scores need of an MLP, in one precision.

    Attributes:
        weight_PD: The weight of `down_proj`.
        norm_P: L2 norm over tokens of each column of its input.
        output_covariance_DD: The covariance of its output; about zero if recovery has no intercept.
        input_norm_D: L2 norm over tokens of each feature of the MLP's input.
        input_weights_PD: Weights into the channels (gate and up), as PyTorch stores them.
    """

    weight_PD: Tensor
    norm_P: Tensor
    output_covariance_DD: Tensor
    input_norm_D: Tensor
    input_weights_PD: Sequence[Tensor]


def choose_channels(statistics: ChannelStatistics, *, num_removed: int, keep_lowest: float) -> ChannelChoice:
    """Remove `num_removed` low-scoring channels, but keep the very lowest, as the published code does.

    Args:
        statistics: The MLP.
        num_removed: Number of channels to remove, in [0, P - 1].
        keep_lowest: Fraction of the channels, those with the lowest scores, that are kept (published: .01).
    """
    scores_P = channel_scores(statistics)
    return ChannelChoice(drop_lowest(scores_P, num_removed, keep_lowest), scores_P)


def drop_lowest(scores_P: Tensor, num_removed: int, keep_lowest: float) -> tuple[int, ...]:
    """Return the kept channels, ascending, after removing low scores just above the kept lowest tail."""
    order = torch.argsort(scores_P, stable=True).tolist()
    # When few channels are left, the tail shrinks first: the highest score always stays.
    tail = min(round(keep_lowest * len(order)), len(order) - num_removed - 1)
    return tuple(sorted(order[:tail] + order[tail + num_removed :]))


def channel_scores(statistics: ChannelStatistics) -> Tensor:
    """Return every channel's score, shape (P,)."""
    weight_PD = statistics.weight_PD
    eigenvalues_D, directions_DD = torch.linalg.eigh(statistics.output_covariance_DD)
    magnitude_D = eigenvalues_D.abs()
    mean = magnitude_D.mean()
    # An MLP with a constant output has no preferred directions.
    importance_D = torch.sigmoid(magnitude_D / mean if mean > 0 else magnitude_D)
    output_P = statistics.norm_P * ((weight_PD @ directions_DD) * importance_D).norm(dim=1)
    norm_D = statistics.input_norm_D.to(weight_PD)
    inputs_P = [(input_PD.to(weight_PD) * norm_D).norm(dim=1) for input_PD in statistics.input_weights_PD]
    return sum(inputs_P, start=output_P)
