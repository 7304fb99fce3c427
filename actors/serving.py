"""Weights for nodes that do not see the driver's files: read beside the driver, and sent once to each node.

A served checkpoint reads like any other, a few tensors at a time. The latest reads stay in Ray's object store, so the
workers of a node share one copy.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from actors.group import Delivery
from actors.waiting import CALL_SECONDS
from slimllm_ops.checkpoint.reading import Checkpoint, StoredWeight, read_tensors
from slimllm_ops.checkpoint.tensor_index import Place

# The layer in use and the next one, of at most two models. A worker that comes later reads them again.
KEPT_READS = 4
# Requests come from all workers at once, and each waits for the disk.
THREADS = 4

# A tensor's bytes, dtype and shape: NumPy has no bfloat16.
Packed = tuple[np.ndarray, torch.dtype, tuple[int, ...]]


class WeightServer:
    """Reads checkpoints where their files are."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, ray.ObjectRef] = OrderedDict()

    def locate(self, directory: Path, files: dict[str, Place]) -> list[ray.ObjectRef]:
        """Return a reference to packed tensors by name, in a list: Ray would fetch a bare one.

        Args:
            directory: The checkpoint's directory on this node.
            files: The place of each tensor, by its name.

        Raises:
            CheckpointError: A file is missing or broken.
        """
        # Refining replaces a layer's file, so the time of change is part of the key.
        times = tuple(_modified(directory / file) for file in sorted({place.file for place in files.values()}))
        key = (directory, tuple(files), times)
        reference = self._kept.get(key)
        if reference is None:
            packed = {name: _pack(tensor) for name, tensor in read_tensors(directory, files).items()}
            reference = self._kept[key] = ray.put(packed)
        while len(self._kept) > KEPT_READS:
            self._kept.popitem(last=False)
        return [reference]


@dataclass(frozen=True)
class ServedWeight(StoredWeight):
    """One weight of a layer, whose tensors come from a server."""

    server: Any

    def read_parts(self) -> dict[str, Tensor]:
        """Return the tensors that make up the weight, by their full names."""
        return _fetch(self.server, self.directory, self.files)


@dataclass(frozen=True)
class ServedCheckpoint(Checkpoint):
    """A checkpoint whose tensors come from a server, wherever this one travels."""

    server: Any

    @classmethod
    def of(cls, checkpoint: Checkpoint, server: Any) -> "ServedCheckpoint":
        """Serve a checkpoint."""
        return cls(checkpoint.directory, checkpoint.config, checkpoint.family, checkpoint.files, server)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors by their full names, as stored."""
        return _fetch(self.server, self.directory, {name: self.files[name] for name in names})

    def stored_weight(self, layer: int, name: str) -> ServedWeight:
        """Return where a tensor of a layer is stored; its name is that of the model's class, relative to the layer."""
        weight = super().stored_weight(layer, name)
        return ServedWeight(
            weight.directory, weight.files, weight.prefix, weight.split, weight.num_experts, self.server
        )


@contextmanager
def weight_server() -> Iterator[Delivery]:
    """Run a server on the driver's node; yield a function that makes it serve a checkpoint."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # It can read everything again, so Ray may restart it and repeat calls.
    remote = ray.remote(WeightServer).options(
        num_cpus=0, max_concurrency=THREADS, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1
    )
    server: Any = remote.remote()
    try:
        yield lambda checkpoint: ServedCheckpoint.of(checkpoint, server)
    finally:
        ray.kill(server)


@contextmanager
def shared_files() -> Iterator[Delivery]:
    """Yield a function that returns a checkpoint unchanged: every node finds its files by their paths."""
    yield lambda checkpoint: checkpoint


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _fetch(server: Any, directory: Path, files: dict[str, Place]) -> dict[str, Tensor]:
    """Return tensors as stored, by name, from a server; `files` says where each is stored."""
    (located,) = ray.get(server.locate.remote(directory, files), timeout=CALL_SECONDS)
    return {name: _unpack(packed) for name, packed in ray.get(located, timeout=CALL_SECONDS).items()}


def _pack(tensor: Tensor) -> Packed:
    return tensor.contiguous().flatten().view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def _unpack(packed: Packed) -> Tensor:
    content, dtype, shape = packed
    # Received arrays are read-only views of shared memory, and callers change weights in place.
    return torch.from_numpy(content.copy()).view(dtype).view(shape)
