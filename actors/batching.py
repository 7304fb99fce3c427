"""Token blocks in batches: what is computed at once, and the unit in which a shard's share is counted."""

import numpy as np

# Tokens that a processor is kept busy with; more would take memory and gain nothing.
BATCH_TOKENS = 4096
# Small data in so many parts at least, so that they spread over workers.
MIN_BATCHES = 16


def into_batches(blocks_BT: np.ndarray, tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
    """Cut blocks (B, T) into batches (b, T) of so many tokens at most; the rule does not depend on the workers."""
    num_blocks, length = blocks_BT.shape
    size = blocks_at_once(num_blocks, length, tokens)
    return [blocks_BT[start : start + size] for start in range(0, num_blocks, size)]


def blocks_at_once(num_blocks: int, length: int, tokens: int = BATCH_TOKENS) -> int:
    """Return how many blocks of such a length a batch has, of so many in all."""
    return max(1, min(tokens // length, num_blocks // MIN_BATCHES))
