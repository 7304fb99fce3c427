"""The group of shards on a real Ray: it is the one shard it is cut from, and says what went wrong in a worker."""

import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch

from actors import placement as placement_module
from actors.batching import into_batches
from actors.errors import ShardError
from actors.group import ShardGroup, _split_evenly
from actors.placement import Placement
from actors.serving import shared_files
from actors.shard import Shard
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import CheckpointError, InputError, MiscountError, NonFiniteError
from slimllm_ops.stream.footprint import Footprint

NUM_WORKERS = 3


@contextmanager
def group_of(num_workers: int, cpus: int = 1, notes: list[str] | None = None) -> Iterator[ShardGroup]:
    with (
        Placement(num_workers, cpus, 0.0) as placement,
        shared_files() as deliver,
        ShardGroup(placement, deliver, notes.append if notes is not None else print) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def shards(local_ray: None) -> Iterator[ShardGroup]:
    with group_of(NUM_WORKERS) as group:
        yield group


@pytest.fixture(scope="module")
def one(local_ray: None) -> Iterator[tuple[ShardGroup, list[str]]]:
    """A group of one worker, and what it notes."""
    notes: list[str] = []
    with group_of(1, notes=notes) as group:
        yield group, notes


@pytest.fixture(scope="module")
def spilling(local_ray: None) -> Iterator[ShardGroup]:
    """One worker that holds what three hold, in files."""
    with (
        Placement(1, 1, 0.0) as placement,
        shared_files() as deliver,
        ShardGroup(placement, deliver, print, num_shards=NUM_WORKERS, offload=True) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def alone(gqa_model: Path, blocks_BT: np.ndarray) -> Shard:
    """The same data in one shard, in this process."""
    threads = torch.get_num_threads()
    shard = Shard("cpu", threads)
    shard.open_stream("a", Checkpoint.open(gqa_model), into_batches(blocks_BT))
    return shard


@pytest.fixture(scope="module")
def blocks_BT(token_blocks: np.ndarray) -> np.ndarray:
    return token_blocks[:10]


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
    shards: ShardGroup, alone: Shard, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    checkpoint = Checkpoint.open(gqa_model)
    shards.open_stream("a", checkpoint, blocks_BT)
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


def test_fewer_batches_than_workers_do(shards: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray) -> None:
    shards.open_stream("few", Checkpoint.open(gqa_model), blocks_BT[:2])
    assert -1 <= shards.forward("few", 0) <= 1
    shards.close_stream("few")


def test_what_a_worker_raises_for_the_user_arrives_as_it_was(
    shards: ShardGroup, gqa_model: Path, tmp_path: Path, blocks_BT: np.ndarray
) -> None:
    checkpoint = Checkpoint.open(shutil.copytree(gqa_model, tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"^shard model.safetensors of .*model is missing") as raised:
        shards.open_stream("none", checkpoint, blocks_BT)
    assert raised.type is CheckpointError


@pytest.mark.parametrize("error", [ShardError("a"), CheckpointError("b"), NonFiniteError("c")])
def test_errors_cross_a_cluster(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_too_many_workers_for_the_cluster_are_not_waited_for_without_end(
    local_ray: None, gqa_model: Path, blocks_BT: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement_module, "START_SECONDS", 1.0)
    message = r"no room for 2 workers of 1000 CPUs and 0 GPUs within 1 s, .* free: .* lower --workers"
    with pytest.raises(ShardError, match=message), group_of(2, cpus=1000) as group:
        group.open_stream("a", Checkpoint.open(gqa_model), blocks_BT)


def workers() -> list[psutil.Process]:
    """The processes of all shards that this process's Ray runs."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and " ".join(child.cmdline()).startswith("ray::Shard")]


def test_a_worker_that_is_killed_is_told_of_at_once_and_closing_ends_the_others(
    local_ray: None, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    others = {process.pid for process in workers()}
    with group_of(2) as group:
        group.open_stream("a", Checkpoint.open(gqa_model), blocks_BT)
        mine = [process for process in workers() if process.pid not in others]
        assert len(mine) == 2
        os.kill(mine[1].pid, signal.SIGKILL)
        with pytest.raises(ShardError, match=r"a worker died: .*; was its node lost, or out of memory\?"):
            group.forward("a", 0)
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert not alive


def test_free_memory_is_shared_by_the_workers_of_a_machine(shards: ShardGroup) -> None:
    shards.start()
    assert shards._free_memory() == pytest.approx(psutil.virtual_memory().available / NUM_WORKERS, rel=0.2)


def test_micro_batches_shrink_where_memory_is_short_and_it_is_said(
    one: tuple[ShardGroup, list[str]], gqa_model: Path, token_blocks: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, blocks_BT = Checkpoint.open(gqa_model), np.tile(token_blocks, (8, 1))
    footprint = Footprint.of(checkpoint, torch.device("cpu"), deciding=False)
    group, notes = one
    group.open_stream("enough", checkpoint, blocks_BT)
    held = footprint.states_per_token * blocks_BT.size
    free = footprint.fixed + held + 40 * footprint.activations_per_token
    monkeypatch.setattr(group, "_free_memory", lambda: free)
    group.open_stream("little", checkpoint, blocks_BT)
    sizes = {name: ray.get(group._actors[0].__ray_call__.remote(batch_sizes, name)) for name in ("enough", "little")}
    assert group.forward("little", 0) == pytest.approx(group.forward("enough", 0), rel=1e-6)
    # 16 batches at least: 192 blocks of 16 tokens are 12 blocks a batch, and two blocks are within 40 tokens.
    assert sizes == {"enough": [12] * 16, "little": [2] * 96}
    assert notes == ["micro-batches of 32 tokens: 0.0 GB are free per worker"]


def batch_sizes(shard: Shard, name: str) -> list[int]:
    return [len(ids) for ids in shard._streams[f"{name}, shard 0"].batches]


def test_what_does_not_fit_is_refused_before_anything_is_read(
    one: tuple[ShardGroup, list[str]], gqa_model: Path, blocks_BT: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group, _), checkpoint = one, Checkpoint.open(gqa_model)
    fixed = Footprint.of(checkpoint, torch.device("cpu"), deciding=True).fixed
    message = r"each of 1 worker\(s\) needs .* GB, .* for the hidden states .* are free for it: add --offload, or"
    monkeypatch.setattr(group, "_free_memory", lambda: fixed)
    with pytest.raises(InputError, match=message):
        group.open_stream("a", checkpoint, blocks_BT, deciding=True)


def test_states_that_are_offloaded_need_no_memory(
    spilling: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(gqa_model)
    footprint = Footprint.of(checkpoint, torch.device("cpu"), deciding=False)
    free = footprint.fixed + 16 * footprint.activations_per_token
    monkeypatch.setattr(spilling, "_free_memory", lambda: free)
    spilling.open_stream("spilled", checkpoint, blocks_BT)
    states = ray.get(spilling._actors[0].__ray_call__.remote(type_of_states))
    assert -1 <= spilling.forward("spilled", 0) <= 1
    assert states == "SpilledStates"


def type_of_states(shard: Shard) -> str:
    return type(shard._streams["spilled, shard 0"].hidden).__name__


def prune_first_layer(group: ShardGroup, model: Path, blocks_BT: np.ndarray) -> tuple[LayerPlan, np.ndarray]:
    """Decide a layer by the paper's method; return its plan, and the states that it leaves."""
    checkpoint = Checkpoint.open(model)
    attention, mlp = checkpoint.family.attention, checkpoint.family.mlp
    group.open_stream("a", checkpoint, blocks_BT, deciding=True)
    heads = group.decide_heads("a", 0, group.observe("a", 0, attention), num_removed=1)
    group.apply("a", 0, attention, heads)
    channels = group.decide_channels("a", 0, group.observe("a", 0, mlp), num_removed=9, keep_lowest=0.01)
    group.apply("a", 0, mlp, channels)
    states_TD = group.probe("a")
    group.close_stream("a")
    return LayerPlan(heads, channels), states_TD


def test_what_lost_workers_held_is_held_by_others_to_the_last_bit(
    shards: ShardGroup, spilling: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    plan, state_TD = prune_first_layer(shards, gqa_model, blocks_BT)
    spilling.open_stream("b", Checkpoint.open(gqa_model), blocks_BT)
    spilling.forward_pruned("b", 0, plan)
    assert np.array_equal(spilling.probe("b"), state_TD)
    again, again_TD = prune_first_layer(spilling, gqa_model, blocks_BT)
    assert again.describe() == plan.describe()
    assert np.array_equal(again_TD, state_TD)


def test_moments_of_other_than_all_tokens_are_refused(
    shards: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    checkpoint = Checkpoint.open(gqa_model)
    shards.open_stream("a", checkpoint, blocks_BT, deciding=True)
    observed = shards.observe("a", 0, checkpoint.family.mlp)
    shards._streams["a"] = replace(shards._streams["a"], num_tokens=blocks_BT.size + 1)
    with pytest.raises(MiscountError, match=rf"layer 0: .* of {blocks_BT.size} tokens where {blocks_BT.size + 1} were"):
        shards.decide_channels("a", 0, observed, num_removed=3, keep_lowest=0.01)
    shards.close_stream("a")
