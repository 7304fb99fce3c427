"""Samples tokens from a model's distribution.

Shapes: N distributions, V vocabulary.
"""

import torch
from torch import Tensor


def sample(logits_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Return one token (N,), int64, from each row's distribution at temperature 1.

    Args:
        logits_NV: The logits, float32.
        uniform_N: A number in [0, 1) for each row. The token is where the row's cumulative probability exceeds it.
    """
    cumulative_NV = logits_NV.softmax(dim=-1).cumsum(dim=-1)
    below_N = uniform_N * cumulative_NV[:, -1]
    return torch.searchsorted(cumulative_NV, below_N[:, None], right=True)[:, 0].clamp_(max=logits_NV.shape[1] - 1)
