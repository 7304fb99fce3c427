"""Batches are the blocks in order, and their size does not depend on the number of workers."""

import numpy as np
import pytest

from actors.batching import BATCH_TOKENS, MIN_BATCHES, into_batches


@pytest.mark.parametrize("tokens", [BATCH_TOKENS, 40])
@pytest.mark.parametrize(("num_blocks", "length"), [(1, 8), (15, 8), (16, 8), (33, 8), (1000, 64), (5, 5000)])
def test_batches_are_the_blocks_in_order_within_the_bounds(num_blocks: int, length: int, tokens: int) -> None:
    blocks_BT = np.arange(num_blocks * length, dtype=np.int32).reshape(num_blocks, length)
    batches = into_batches(blocks_BT, tokens)
    assert np.array_equal(np.concatenate(batches), blocks_BT)
    assert len(batches) >= min(num_blocks, MIN_BATCHES)
    assert all(len(batch) == 1 or batch.size <= tokens for batch in batches)
