"""Token blocks in batches: what is computed at once, and the unit in which a shard's share is counted."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from slimllm_ops.errors import InputError
from slimllm_ops.stream.footprint import Footprint

# Tokens that keep a processor busy; more take memory and gain nothing.
BATCH_TOKENS = 4096
# Tokens that whole models score at once; more take memory for logits and gain little.
SCORED_TOKENS = 1024
# Sequences that a model samples together; more take memory, and leave workers without any.
SEQUENCES_AT_ONCE = 32
# Requests that a whole model answers at once; more wait for the longest of them.
REQUESTS_AT_ONCE = 64
# Tokens of a request, as far as memory is planned; those of the usual tasks are shorter.
LONGEST_REQUEST = 2048
# Small data give at least this many batches, so that they spread over workers.
MIN_BATCHES = 16


def into_batches(blocks_BT: np.ndarray, tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
    """Cut blocks (B, T) into batches (b, T) of at most `tokens` tokens; the rule does not depend on the workers."""
    num_blocks, length = blocks_BT.shape
    size = blocks_at_once(num_blocks, length, tokens)
    return [blocks_BT[start : start + size] for start in range(0, num_blocks, size)]


def blocks_at_once(num_blocks: int, length: int, tokens: int = BATCH_TOKENS) -> int:
    """Return how many blocks of a length a batch has, when there are `num_blocks` in all."""
    return max(1, min(tokens // length, num_blocks // MIN_BATCHES))


def split_evenly(batches: list[np.ndarray], num_shares: int) -> list[list[np.ndarray]]:
    """Cut a list into contiguous shares whose lengths differ by one at most, the longer ones first."""
    size, longer = divmod(len(batches), num_shares)
    starts = [share * size + min(share, longer) for share in range(num_shares + 1)]
    return [batches[start:stop] for start, stop in pairwise(starts)]


def sequences_that_fit(footprint: Footprint, length: int, free: int) -> int:
    """Return how many sequences of a length are sampled together in some free bytes; 0 if none fits."""
    return max(0, min(SEQUENCES_AT_ONCE, footprint.tokens_at_once(free, 0) // length))


def sequences_at_once(whole: Footprint, by_layer: Footprint, length: int, free: int) -> int:
    """Return how many sequences a worker samples together.

    Args:
        whole: The memory that sampling takes with all layers in memory.
        by_layer: The memory that it takes with one layer at a time in memory.
        length: The tokens of a sequence.
        free: The bytes that are free for a worker.

    Raises:
        InputError: The memory does not hold one sequence.
    """
    if number := sequences_that_fit(whole, length, free) or sequences_that_fit(by_layer, length, free):
        return number
    needed = by_layer.fixed + by_layer.activations_per_token * length
    raise InputError(
        f"to sample a sequence of {length} tokens, each worker needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
        f"are free for it: lower --sequence-length, or calibrate on text"
    )


def scored_at_once(footprint: Footprint, length: int, free: int) -> int:
    """Return how many tokens whole models score at once.

    Args:
        footprint: The memory that the models take.
        length: The tokens of a window.
        free: The bytes that are free for a worker.

    Raises:
        InputError: The memory does not hold the models and one window.
    """
    tokens = footprint.tokens_at_once(free, 0)
    if tokens < length:
        needed = footprint.fixed + footprint.activations_per_token * length
        raise InputError(
            f"to score a window of {length} tokens, each worker needs {needed / 1e9:.1f} GB, "
            f"{footprint.fixed / 1e9:.1f} of them for whole models, and {free / 1e9:.1f} GB are free for it: pass "
            f"fewer --workers, a shorter --length, or one model at a time"
        )
    return min(tokens, SCORED_TOKENS)


def requests_at_once(footprint: Footprint, length: int, free: int) -> int:
    """Return how many requests of a length a whole model answers at once; 1 at least.

    Args:
        footprint: The memory that the model takes.
        length: The most tokens of a request.
        free: The bytes that are free for a worker.
    """
    return max(1, min(REQUESTS_AT_ONCE, footprint.tokens_at_once(free, 0) // length))


def micro_batch_tokens(
    footprint: Footprint, blocks_BT: np.ndarray, held_blocks: int, free: int, note: Callable[[str], None]
) -> int:
    """Return the tokens of a micro-batch: enough to keep a processor busy, fewer when memory is short.

    Args:
        footprint: The memory that a stream takes.
        blocks_BT: All blocks.
        held_blocks: The blocks whose hidden states one worker holds in memory.
        free: The bytes that are free for a worker.
        note: Receives a line when memory is short.

    Raises:
        InputError: The memory does not hold the states and one block's activations.
    """
    length = blocks_BT.shape[1]
    tokens = footprint.tokens_at_once(free, held_blocks * length)
    if tokens < length:
        held = footprint.states_per_token * held_blocks * length
        needed = footprint.fixed + held + footprint.activations_per_token * length
        raise InputError(
            f"each worker needs {needed / 1e9:.1f} GB, {held / 1e9:.1f} of them for the hidden states of its tokens, "
            f"and {free / 1e9:.1f} GB are free for it: add --offload, or workers on other nodes, or calibrate on fewer "
            f"or shorter blocks"
        )
    if tokens < min(BATCH_TOKENS, blocks_BT.size):
        note(f"micro-batches of {tokens // length * length} tokens: {free / 1e9:.1f} GB are free per worker")
    return min(tokens, BATCH_TOKENS)
