"""A group of shards computes what one shard computes, and rejects input that does not fit."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from actors.batching import into_batches, split_evenly
from actors.errors import ShardError
from actors.group import ShardGroup
from actors.local import LocalWorkers
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.paper import choose_channels_by_output, decide_heads
from slimllm_ops.errors import CheckpointError, InputError, MiscountError, NonFiniteError
from slimllm_ops.stream.footprint import Footprint
from slimllm_ops.stream.outputs import LayerwiseStream
from slimllm_ops.stream.passes import LayerStream

NUM_WORKERS = 3


def group_of(num_workers: int, **settings: Any) -> ShardGroup:
    """Shards in this process."""
    return ShardGroup(LocalWorkers(num_workers, 1, offload=settings.get("offload", False)), num_workers, **settings)


@pytest.fixture
def shards() -> Iterator[ShardGroup]:
    with group_of(NUM_WORKERS) as group:
        yield group


@pytest.fixture
def alone(gqa_model: Path, blocks_BT: np.ndarray) -> LayerStream:
    """The same data in one stream."""
    ids = [torch.from_numpy(batch.astype(np.int64)) for batch in into_batches(blocks_BT)]
    return LayerStream(Checkpoint.open(gqa_model), ids, torch.device("cpu"))


@pytest.fixture(scope="module")
def blocks_BT(token_blocks: np.ndarray) -> np.ndarray:
    return token_blocks[:10]


@pytest.mark.parametrize(("count", "shares"), [(7, 3), (3, 3), (2, 3), (6, 3), (1, 1)])
def test_shares_are_contiguous_and_even(count: int, shares: int) -> None:
    batches = [np.full((1, 1), number) for number in range(count)]
    split = split_evenly(batches, shares)
    assert [int(batch[0, 0]) for share in split for batch in share] == list(range(count))
    lengths = [len(share) for share in split]
    assert len(lengths) == shares
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_a_group_computes_what_one_stream_computes(
    shards: ShardGroup, alone: LayerStream, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    checkpoint = Checkpoint.open(gqa_model)
    shards.open_stream("a", checkpoint, blocks_BT)
    attention = checkpoint.family.attention
    assert shards.mean("a", LayerStream.forward, 0) == pytest.approx(alone.forward(0).value)
    observed = shards.merge("a", LayerStream.observe, 1, attention)
    heads = shards.get(shards.decide("a", decide_heads, observed, 1, num_removed=1))
    expected = decide_heads(alone, alone.observe(1, attention), 1, num_removed=1)
    assert heads.kept == expected.kept
    assert heads.scores == pytest.approx(expected.scores, rel=1e-5)
    power = shards.mean("a", LayerStream.apply, 1, attention, heads)
    assert power == pytest.approx(alone.apply(1, attention, expected).value)
    assert np.array_equal(shards.first("a", LayerStream.probed_ids), alone.probed_ids())
    assert np.allclose(shards.first("a", LayerStream.probe), alone.probe(), rtol=1e-5, atol=1e-6)


def first_ids(stream: LayerStream, before: list[int] | None, layer: int) -> list[int]:
    return [*(before or []), int(stream.batches[0][0, 0])]


def test_what_a_shard_returns_is_handed_on_to_the_next(
    shards: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    shards.open_stream("a", Checkpoint.open(gqa_model), blocks_BT)
    once = shards.hand_on("a", first_ids, None, 0)
    # 10 batches of a block each: shares of 4, 3 and 3.
    expected = [int(blocks_BT[start, 0]) for start in (0, 4, 7)]
    assert shards.get(once) == expected
    assert shards.get(shards.hand_on("a", first_ids, once, 0)) == 2 * expected


def test_fewer_batches_than_workers_do(shards: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray) -> None:
    shards.open_stream("few", Checkpoint.open(gqa_model), blocks_BT[:2])
    assert len(shards.each("few", LayerStream.forward, 0)) == 2


@pytest.mark.parametrize("error", [ShardError("a"), CheckpointError("b"), NonFiniteError("c")])
def test_errors_cross_a_cluster(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_free_memory_is_shared_by_the_workers_of_a_machine(shards: ShardGroup) -> None:
    shards._workers.start()
    assert shards._free_memory() == pytest.approx(psutil.virtual_memory().available / NUM_WORKERS, rel=0.2)


def test_micro_batches_shrink_where_memory_is_short_and_it_is_said(
    gqa_model: Path, token_blocks: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, blocks_BT = Checkpoint.open(gqa_model), np.tile(token_blocks, (8, 1))
    footprint = Footprint.of(checkpoint, torch.device("cpu"))
    notes: list[str] = []
    group = group_of(1, note=notes.append)
    group.open_stream("enough", checkpoint, blocks_BT)
    held = footprint.states_per_token * blocks_BT.size
    free = footprint.fixed + held + 40 * footprint.activations_per_token
    monkeypatch.setattr(group, "_free_memory", lambda: free)
    group.open_stream("little", checkpoint, blocks_BT)
    sizes = {name: group.first(name, batch_sizes) for name in ("enough", "little")}
    little, enough = (group.mean(name, LayerStream.forward, 0) for name in ("little", "enough"))
    assert little == pytest.approx(enough, rel=1e-6)
    # 16 batches at least: 192 blocks of 16 tokens are 12 blocks a batch, and two blocks are within 40 tokens.
    assert sizes == {"enough": [12] * 16, "little": [2] * 96}
    assert notes == ["micro-batches of 32 tokens: 0.0 GB are free per worker"]


def batch_sizes(stream: LayerStream) -> list[int]:
    return [len(ids) for ids in stream.batches]


def test_what_does_not_fit_is_refused_before_anything_is_read(
    gqa_model: Path, blocks_BT: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, group = Checkpoint.open(gqa_model), group_of(1)
    fixed = Footprint.of_layerwise(checkpoint, torch.device("cpu")).fixed
    monkeypatch.setattr(group, "_free_memory", lambda: fixed)
    message = r"each worker needs .* GB, .* for the hidden states .* are free for it: add --offload, or"
    with pytest.raises(InputError, match=message):
        group.open_layerwise("a", checkpoint, blocks_BT)


def test_states_that_are_offloaded_need_no_memory(
    gqa_model: Path, blocks_BT: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, group = Checkpoint.open(gqa_model), group_of(1, offload=True)
    footprint = Footprint.of(checkpoint, torch.device("cpu"))
    monkeypatch.setattr(group, "_free_memory", lambda: footprint.fixed + 16 * footprint.activations_per_token)
    group.open_stream("a", checkpoint, blocks_BT)
    assert group.first("a", type_of_states) == "SpilledStates"
    assert -1 <= group.mean("a", LayerStream.forward, 0) <= 1


def type_of_states(stream: LayerStream) -> str:
    return type(stream.hidden).__name__


def test_moments_of_other_than_all_tokens_are_refused(
    shards: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    checkpoint = Checkpoint.open(gqa_model)
    shards.open_layerwise("a", checkpoint, blocks_BT)
    observed = shards.merge("a", LayerwiseStream.observe_output, 0)
    shards._streams["a"] = replace(shards._streams["a"], num_tokens=blocks_BT.size + 1)
    with pytest.raises(MiscountError, match=rf"layer 0, .* {blocks_BT.size} tokens, but {blocks_BT.size + 1} were"):
        shards.decide("a", choose_channels_by_output, observed, 0, num_removed=3, keep_lowest=0.01)
