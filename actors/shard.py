"""One worker's part of the data: a plain class, so that it runs in this process as well as on Ray.

A shard opens and closes streams, runs a step of a stream, merges results and reports memory. A step is a function of
`slimllm_ops` that takes the stream first, such as `LayerStream.forward_pruned`.

What a method returns depends on its arguments and on the steps before it, never on timing.
"""

import os
import resource
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from slimllm_ops.moments.observation import Counted, require_tokens
from slimllm_ops.moments.states import SpilledStates, StateStore
from slimllm_ops.stream.memory import free_memory, return_large_blocks
from slimllm_ops.stream.opening import Workplace

R = TypeVar("R")
# The arguments of a step: positional, and by name.
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class Mergeable(Protocol):
    """A result of one shard that adds up with another's."""

    def merge(self, other: Any, /) -> Any:
        """Return the result over both shards' tokens."""


class Shard:
    """The hidden states of a share of the data, one stream per name.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads to compute with.
        offload: Whether to hold hidden states in files of this node's temporary folder, not in memory.
    """

    def __init__(self, device: str, threads: int, offload: bool = False) -> None:
        return_large_blocks()
        # Ray may be told of more CPUs than there are.
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self._device = torch.device(device)
        spill: StateStore = partial(SpilledStates, Path(gettempdir()), self._device)
        self._workplace = Workplace(self._device, spill if offload else list, spill)
        self._streams: dict[str, Any] = {}

    def open(self, name: str, build: Callable[..., Any], batches: list[np.ndarray], *models: Any) -> None:
        """Open a stream.

        Args:
            name: What later calls name it by.
            build: Makes it from this shard's workplace, its batches of token ids and the models.
            batches: Token ids, each (b, T), int32.
            models: The checkpoints it passes.
        """
        ids = [torch.from_numpy(batch.astype(np.int64)) for batch in batches]
        self._streams[name] = build(self._workplace, ids, *models)

    def close(self, name: str) -> None:
        """Close a stream and free its memory."""
        self._streams.pop(name).close()

    def run(self, name: str, step: Callable[..., R], arguments: Arguments) -> R:
        """Run a step of a stream."""
        positional, named = arguments
        return step(self._streams[name], *positional, **named)

    def run_with(self, name: str, step: Callable[..., R], value: Any, arguments: Arguments) -> R:
        """Run a step that takes a value which lies on the cluster, before its other arguments."""
        positional, named = arguments
        return step(self._streams[name], value, *positional, **named)

    def receive(self, value: Any) -> None:
        """Take a value and return nothing, so that the driver can wait for the value without fetching it."""

    def merge(self, left: Mergeable, right: Mergeable) -> Any:
        """Return the merged results of two shards."""
        return left.merge(right)

    def require_tokens(self, observed: Counted, num_tokens: int, label: str) -> None:
        """Check that merged moments are of all tokens; see `slimllm_ops.moments.observation.require_tokens`."""
        require_tokens(observed, num_tokens, label)

    def free_memory(self) -> tuple[str, int]:
        """Return where states are held (the machine's name, or the GPU's), and the bytes that are free there."""
        if self._device.type == "cuda":
            return str(torch.cuda.get_device_properties(self._device).uuid), free_memory(self._device)
        return socket.gethostname(), free_memory(self._device)

    def peak_memory(self) -> dict[str, int]:
        """Return this process's peak resident memory, and its GPU's, in bytes."""
        return peak_memory(self._device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak resident memory of this process, and of its share of the GPU, in bytes."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
