"""Batches are the blocks in order, and their size does not depend on the number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.batching import (
    BATCH_TOKENS,
    MIN_BATCHES,
    REQUESTS_AT_ONCE,
    SCORED_TOKENS,
    into_batches,
    requests_at_once,
    scored_at_once,
)
from slimllm_ops.checkpoint.whole import WholeModel
from slimllm_ops.errors import InputError
from slimllm_ops.stream.footprint import Footprint


@pytest.mark.parametrize("tokens", [BATCH_TOKENS, 40])
@pytest.mark.parametrize(("num_blocks", "length"), [(1, 8), (15, 8), (16, 8), (33, 8), (1000, 64), (5, 5000)])
def test_batches_are_the_blocks_in_order_within_the_bounds(num_blocks: int, length: int, tokens: int) -> None:
    blocks_BT = np.arange(num_blocks * length, dtype=np.int32).reshape(num_blocks, length)
    batches = into_batches(blocks_BT, tokens)
    assert np.array_equal(np.concatenate(batches), blocks_BT)
    assert len(batches) >= min(num_blocks, MIN_BATCHES)
    assert all(len(batch) == 1 or batch.size <= tokens for batch in batches)


def test_whole_models_take_as_much_at_once_as_their_memory_holds() -> None:
    whole = WholeModel(Path("model"), vocab_size=1000, max_length=None, hidden_size=64, num_parameters=10**6)
    footprint = Footprint.of_whole([whole, whole], torch.device("cpu"))
    models, per_token = 2 * 4 * 10**6, footprint.activations_per_token
    assert footprint.fixed == models
    assert scored_at_once(footprint, 8, models + 20 * per_token) == 20
    assert scored_at_once(footprint, 8, 10**12) == SCORED_TOKENS
    with pytest.raises(InputError, match=r"to score a window of 8 tokens, each worker needs .* GB are free for it"):
        scored_at_once(footprint, 8, models + 7 * per_token)
    assert requests_at_once(footprint, 8, models + 20 * per_token) == 2
    assert requests_at_once(footprint, 8, models) == 1
    assert requests_at_once(footprint, 8, 10**12) == REQUESTS_AT_ONCE
