"""Marks padding in token blocks, so that blocks of one length hold rows of different lengths.

Padding stands at the end of a block. Attention is causal, so no token reads it. It needs only to be left out of what is
summed over tokens.

Shapes: B blocks of T tokens, b blocks in a batch, n tokens of a batch that are not padding.
"""

import numpy as np
import torch
from torch import Tensor

# Stands in place of a token id; no vocabulary has it.
PADDING = -1


def count_tokens(ids_BT: np.ndarray) -> int:
    """Return how many tokens blocks hold, without padding."""
    return int(np.count_nonzero(ids_BT != PADDING))


def token_mask(ids_bT: Tensor, device: torch.device) -> Tensor | None:
    """Return which positions of a batch hold tokens (b, T), on a device; None if all do."""
    mask_bT = ids_bT != PADDING
    return None if mask_bT.all() else mask_bT.to(device)


def filled(ids_bT: Tensor) -> Tensor:
    """Return ids that a model can embed: each block's first token in place of its padding.

    The model computes something for padding too. With a token of the block, it overflows no earlier than the block.
    """
    return torch.where(ids_bT == PADDING, ids_bT[:, :1], ids_bT)


def without_padding(states_bT: Tensor, mask_bT: Tensor) -> Tensor:
    """Return the states (1, n, ...) of a batch's tokens, as one block, from those of all positions (b, T, ...)."""
    return states_bT[mask_bT].unsqueeze(0)
