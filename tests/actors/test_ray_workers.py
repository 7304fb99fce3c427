"""Workers on a real Ray compute what this process computes, and a lost worker is noticed and replaced."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors import placement as placement_module
from actors.errors import ShardError
from actors.group import ShardGroup
from actors.local import LocalWorkers
from actors.placement import Placement
from actors.ray_workers import RayWorkers
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import CheckpointError
from slimllm_ops.stream.outputs import LayerwiseStream
from slimllm_ops.stream.paired import BranchTensors
from slimllm_ops.stream.passes import LayerStream
from slimllm_ops.training.branches import BranchTraining, BranchTrainingStream
from tests.actors.layerwise import prune_layer
from tests.conftest import shard_processes


@contextmanager
def group_of(num_workers: int, cpus: int = 1, num_shards: int | None = None) -> Iterator[ShardGroup]:
    with (
        Placement(num_workers, cpus, 0.0) as placement,
        ShardGroup(RayWorkers(placement), num_shards or num_workers) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def two(local_ray: None) -> Iterator[ShardGroup]:
    """Two workers that stay."""
    with group_of(2) as group:
        yield group


@pytest.fixture(scope="module")
def blocks_BT(token_blocks: np.ndarray) -> np.ndarray:
    return token_blocks[:10]


def prune_first_layer(group: ShardGroup, model: Path, blocks_BT: np.ndarray) -> tuple[LayerPlan, np.ndarray]:
    """Decide a layer by the paper's method; return its plan, and the states after it."""
    checkpoint = Checkpoint.open(model)
    group.open_layerwise("a", checkpoint, blocks_BT)
    plan = prune_layer(group, "a", checkpoint, 0, num_channels=9)
    state_TD = group.first("a", LayerStream.probe)
    group.close_stream("a")
    return plan, state_TD


def test_ray_and_this_process_compute_the_same_bits(two: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray) -> None:
    plan, state_TD = prune_first_layer(two, gqa_model, blocks_BT)
    with ShardGroup(LocalWorkers(2, 1), 2) as local:
        here, here_TD = prune_first_layer(local, gqa_model, blocks_BT)
    assert here.describe() == plan.describe()
    assert np.array_equal(here_TD, state_TD)


def test_what_lost_workers_held_is_held_by_others_to_the_last_bit(
    two: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    plan, state_TD = prune_first_layer(two, gqa_model, blocks_BT)
    with group_of(1, num_shards=2) as group:
        group.open_layerwise("b", Checkpoint.open(gqa_model), blocks_BT)
        group.each("b", LayerwiseStream.forward_pruned, 0, plan)
        assert np.array_equal(group.first("b", LayerStream.probe), state_TD)
        again, again_TD = prune_first_layer(group, gqa_model, blocks_BT)
    assert again.describe() == plan.describe()
    assert np.array_equal(again_TD, state_TD)


def train_first_branch(group: ShardGroup, model: Path, blocks_BT: np.ndarray) -> BranchTensors:
    """Train a branch for two epochs; return its tensors."""
    checkpoint, settings = Checkpoint.open(model), BranchTraining(epochs=2, learning_rate=1e-2)
    attention = checkpoint.family.attention
    group.open_branch_training("c", checkpoint, checkpoint, blocks_BT, (0, 2, 2))
    # The dense layer is another one, so there is something to learn.
    group.each("c", BranchTrainingStream.forward_whole, 0)
    group.each("c", BranchTrainingStream.prepare, 1, attention)
    state = None
    for _ in range(settings.epochs):
        state = group.hand_on("c", BranchTrainingStream.train, state, 1, attention, settings, num_steps=20)
    assert state is not None
    tensors = group.get(group.first_with("c", BranchTrainingStream.rounded, state, 1, attention))
    group.close_stream("c")
    return tensors


def test_what_shards_hand_on_is_the_same_on_ray_and_in_this_process_for_any_number_of_shards(
    two: ShardGroup, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    found = train_first_branch(two, gqa_model, blocks_BT)
    with ShardGroup(LocalWorkers(1, 1), 1) as local:
        expected = train_first_branch(local, gqa_model, blocks_BT)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
    before = Checkpoint.open(gqa_model).read_layer(1)
    assert not any(np.array_equal(array, before[name].numpy()) for name, array in found.items())


def test_what_a_worker_raises_for_the_user_arrives_as_it_was(
    two: ShardGroup, gqa_model: Path, tmp_path: Path, blocks_BT: np.ndarray
) -> None:
    checkpoint = Checkpoint.open(shutil.copytree(gqa_model, tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"^shard model.safetensors of .*model is missing") as raised:
        two.open_stream("none", checkpoint, blocks_BT)
    assert raised.type is CheckpointError


def test_too_many_workers_for_the_cluster_are_not_waited_for_without_end(
    local_ray: None, gqa_model: Path, blocks_BT: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement_module, "START_SECONDS", 1.0)
    message = r"no room for 2 workers of 1000 CPUs and 0 GPUs within 1 s; .* free: .* lower --workers"
    with pytest.raises(ShardError, match=message), group_of(2, cpus=1000) as group:
        group.open_stream("a", Checkpoint.open(gqa_model), blocks_BT)


def test_a_worker_that_is_killed_is_told_of_at_once_and_closing_ends_the_others(
    local_ray: None, gqa_model: Path, blocks_BT: np.ndarray
) -> None:
    others = {process.pid for process in shard_processes()}
    with group_of(2) as group:
        group.open_stream("a", Checkpoint.open(gqa_model), blocks_BT)
        mine = [process for process in shard_processes() if process.pid not in others]
        assert len(mine) == 2
        os.kill(mine[1].pid, signal.SIGKILL)
        with pytest.raises(ShardError, match=r"a worker died: .*; was its node lost, or out of memory\?"):
            group.each("a", LayerStream.forward, 0)
        # A run that is otherwise done must not fail here.
        assert group.peak_memory()["host"] > 0
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert not alive
