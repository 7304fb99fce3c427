"""Runs one pass of one shard and measures its peak memory; `test_memory.py` starts it in its own processes."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from actors.group import ShardGroup
from actors.local import LocalWorkers
from benchmarks.sampling import private_memory
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.passes import LayerStream
from slimllm_ops.stream.sensitivity import SensitivityStream
from slimllm_ops.training.branches import BranchTraining, BranchTrainingStream
from tests.actors.layerwise import prune_layer

# Of so many tokens is every micro-batch, however many there are.
AT_ONCE = 512


class Peak:
    """The peak of this process's private memory, sampled beside what it does."""

    def __init__(self) -> None:
        self.size = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.size = max(self.size, private_memory(psutil.Process()))
            time.sleep(0.005)


def main(model: str, way: str, blocks: str, length: str, *options: str) -> None:
    """Pass every layer of a model in a way, such as `deciding`; print the further bytes that it took at its peak."""
    offload = "offload" in options
    workers = LocalWorkers(1, 2, offload=offload)
    shard = ShardGroup(workers, 1, offload=offload, settle=lambda name, compute: AT_ONCE)
    checkpoint = Checkpoint.open(Path(model))
    ids = np.random.default_rng(0).integers(0, 500, size=(int(blocks), int(length))).astype(np.int32)
    # The first product and the first solve load libraries and buffers of theirs: not what grows.
    pass_layer(shard, checkpoint, way, ids[:1], range(1))
    before, peak = private_memory(psutil.Process()), Peak()
    pass_layer(shard, checkpoint, way, ids, range(checkpoint.num_layers))
    print(json.dumps({"peak": peak.size - before}))


def pass_layer(shard: ShardGroup, checkpoint: Checkpoint, way: str, ids: np.ndarray, layers: range) -> None:
    """Pass layers as a method does that decides on the way, as one that leaves the model dense, or there and back.

    Or train their branches.
    """
    if way == "training":
        train_layers(shard, checkpoint, ids, layers)
        return
    if way == "sensitivity":
        shard.open_sensitivity("a", checkpoint, ids)
        for layer in layers:
            shard.each("a", SensitivityStream.forward_kept, layer)
        shard.each("a", SensitivityStream.begin_backward)
        for layer in reversed(layers):
            shard.each("a", SensitivityStream.backward, layer)
        shard.close_stream("a")
        return
    open_stream = shard.open_stream if way == "dense" else shard.open_layerwise
    open_stream("a", checkpoint, ids)
    for layer in layers:
        if way == "deciding":
            prune_layer(shard, "a", checkpoint, layer, num_channels=150)
            continue
        for branch in checkpoint.family.branches:
            shard.merge("a", LayerStream.observe_dense, layer, branch)
    shard.close_stream("a")


def train_layers(shard: ShardGroup, checkpoint: Checkpoint, ids: np.ndarray, layers: range) -> None:
    """Train both branches of layers for an epoch, beside the same model."""
    settings = BranchTraining(epochs=1, learning_rate=1e-4)
    shard.open_branch_training("b", checkpoint, checkpoint, ids, tuple(range(checkpoint.num_layers)))
    for layer in layers:
        for branch in checkpoint.family.branches:
            shard.each("b", BranchTrainingStream.prepare, layer, branch)
            state = shard.hand_on("b", BranchTrainingStream.train, None, layer, branch, settings, num_steps=len(ids))
            rounded = shard.first_with("b", BranchTrainingStream.rounded, state, layer, branch)
            shard.give("b", BranchTrainingStream.apply, rounded, layer, branch)
    shard.close_stream("b")
