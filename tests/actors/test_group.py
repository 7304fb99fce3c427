"""The group of shards on a real Ray: it is the one shard it is cut from, and says what went wrong in a worker."""

import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from actors import placement as placement_module
from actors.errors import ShardError
from actors.group import ShardGroup, _split_evenly
from actors.placement import Placement
from actors.serving import shared_files
from actors.shard import Shard
from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.errors import CheckpointError, NonFiniteError

NUM_WORKERS = 3


@contextmanager
def group_of(num_workers: int, cpus: int = 1) -> Iterator[ShardGroup]:
    with (
        Placement(num_workers, cpus, 0.0) as placement,
        shared_files() as deliver,
        ShardGroup(placement, deliver) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def shards(local_ray: None) -> Iterator[ShardGroup]:
    with group_of(NUM_WORKERS) as group:
        yield group


@pytest.fixture(scope="module")
def alone(gqa_model: Path, batches: list[np.ndarray]) -> Shard:
    """The same data in one shard, in this process."""
    threads = torch.get_num_threads()
    shard = Shard("cpu", threads)
    shard.open_stream("a", Checkpoint.open(gqa_model), batches)
    return shard


@pytest.fixture(scope="module")
def batches(token_blocks: np.ndarray) -> list[np.ndarray]:
    return list(token_blocks[:10].reshape(5, 2, 16))


@pytest.mark.parametrize(("count", "shares"), [(7, 3), (3, 3), (2, 3), (6, 3), (1, 1)])
def test_shares_are_contiguous_and_even(count: int, shares: int) -> None:
    batches = [np.full((1, 1), number) for number in range(count)]
    split = _split_evenly(batches, shares)
    assert [int(batch[0, 0]) for share in split for batch in share] == list(range(count))
    lengths = [len(share) for share in split]
    assert len(lengths) == shares
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_a_group_computes_what_one_shard_computes(
    shards: ShardGroup, alone: Shard, gqa_model: Path, batches: list[np.ndarray]
) -> None:
    checkpoint = Checkpoint.open(gqa_model)
    shards.open_stream("a", checkpoint, batches)
    family = checkpoint.family
    assert shards.forward("a", 0) == pytest.approx(alone.forward("a", 0).value)
    observed = shards.observe("a", 1, family.attention)
    heads = shards.decide_heads("a", 1, observed, num_removed=1)
    expected = alone.decide_heads("a", 1, alone.observe("a", 1, family.attention), num_removed=1)
    assert heads.kept == expected.kept
    assert heads.scores == pytest.approx(expected.scores, rel=1e-5)
    shards.apply("a", 1, family.attention, heads)
    alone.apply("a", 1, family.attention, expected)
    assert np.array_equal(shards.probed_ids("a"), alone.probed_ids("a"))
    assert np.allclose(shards.probe("a"), alone.probe("a"), rtol=1e-5, atol=1e-6)
    shards.close_stream("a")


def test_fewer_batches_than_workers_do(shards: ShardGroup, gqa_model: Path, batches: list[np.ndarray]) -> None:
    shards.open_stream("few", Checkpoint.open(gqa_model), batches[:2])
    assert -1 <= shards.forward("few", 0) <= 1
    shards.close_stream("few")


def test_what_a_worker_raises_for_the_user_arrives_as_it_was(
    shards: ShardGroup, gqa_model: Path, tmp_path: Path, batches: list[np.ndarray]
) -> None:
    checkpoint = Checkpoint.open(shutil.copytree(gqa_model, tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"^shard model.safetensors of .*model is missing") as raised:
        shards.open_stream("none", checkpoint, batches)
    assert raised.type is CheckpointError


@pytest.mark.parametrize("error", [ShardError("a"), CheckpointError("b"), NonFiniteError("c")])
def test_errors_cross_a_cluster(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_too_many_workers_for_the_cluster_are_not_waited_for_without_end(
    local_ray: None, gqa_model: Path, batches: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement_module, "START_SECONDS", 1.0)
    message = r"no room for 2 workers of 1000 CPUs and 0 GPUs within 1 s, .* free: .* lower --workers"
    with pytest.raises(ShardError, match=message), group_of(2, cpus=1000) as group:
        group.open_stream("a", Checkpoint.open(gqa_model), batches)


def workers() -> list[psutil.Process]:
    """The processes of all shards that this process's Ray runs."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and " ".join(child.cmdline()).startswith("ray::Shard")]


def test_a_worker_that_is_killed_is_told_of_at_once_and_closing_ends_the_others(
    local_ray: None, gqa_model: Path, batches: list[np.ndarray]
) -> None:
    others = {process.pid for process in workers()}
    with group_of(2) as group:
        group.open_stream("a", Checkpoint.open(gqa_model), batches)
        mine = [process for process in workers() if process.pid not in others]
        assert len(mine) == 2
        os.kill(mine[1].pid, signal.SIGKILL)
        with pytest.raises(ShardError, match=r"a worker died: .*; was its node lost, or out of memory\?"):
            group.forward("a", 0)
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert not alive
