"""What `test_memory.py` runs in processes of their own: one pass of a shard, and the peak of its memory."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from actors.batching import into_batches
from actors.shard import Shard
from slimllm_ops.checkpoint.reading import Checkpoint

# Of so many tokens is every micro-batch, however many there are.
AT_ONCE = 512


class Peak:
    """The peak of this process's private memory, sampled beside what it does."""

    def __init__(self) -> None:
        self.size = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.size = max(self.size, private_memory())
            time.sleep(0.005)


def main(model: str, way: str, blocks: str, length: str, *options: str) -> None:
    """Pass every layer of a model, `deciding` or `dense`; print the peak above what was taken before, in bytes."""
    shard = Shard("cpu", 2, offload="offload" in options)
    checkpoint = Checkpoint.open(Path(model))
    ids = np.random.default_rng(0).integers(0, 500, size=(int(blocks), int(length))).astype(np.int32)
    # The first product and the first solve load libraries and buffers of theirs: not what grows.
    pass_layer(shard, checkpoint, way, ids[:1], range(1))
    before, peak = private_memory(), Peak()
    pass_layer(shard, checkpoint, way, ids, range(checkpoint.num_layers))
    print(json.dumps({"peak": peak.size - before}))


def private_memory() -> int:
    """Return the bytes that are this process's alone; USS would be as good, and takes the system ten times as long."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def pass_layer(shard: Shard, checkpoint: Checkpoint, way: str, ids: np.ndarray, layers: range) -> None:
    """Pass layers as a method does that decides on the way, or as one that leaves the model dense."""
    attention, mlp = checkpoint.family.attention, checkpoint.family.mlp
    shard.open_stream("a", checkpoint, into_batches(ids, AT_ONCE))
    for layer in layers:
        if way == "dense":
            for branch in (attention, mlp):
                shard.observe_dense("a", layer, branch)
            continue
        observed = shard.observe("a", layer, attention)
        shard.apply("a", layer, attention, shard.decide_heads("a", layer, observed, num_removed=1))
        observed = shard.observe("a", layer, mlp)
        decision = shard.decide_channels("a", layer, observed, num_removed=300, keep_lowest=0.01)
        shard.apply("a", layer, mlp, decision)
    shard.close_stream("a")
