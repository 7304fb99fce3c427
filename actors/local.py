"""Workers in this process: the same `Shard` objects and solves as on Ray, one after the other, without Ray.

For debugging with breakpoints, and for tiny models, where starting Ray takes most of the time. A run gives the same
bytes as on Ray with the same number of shards: each computes with as many threads as its actor would.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from actors.shard import Shard
from actors.workers import Reference, solve_threads

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Held(Reference[T]):
    """A value in this process."""

    value: T


class LocalWorkers:
    """Workers in this process (see `actors.workers.Workers`).

    Args:
        num_workers: How many `Shard` objects there are.
        cpus_per_worker: CPU threads that each computes with.
        device: "cpu" or "cuda".
        offload: Whether they hold hidden states in files.
    """

    def __init__(self, num_workers: int, cpus_per_worker: int, device: str = "cpu", *, offload: bool = False) -> None:
        self._num_workers = num_workers
        self._cpus = cpus_per_worker
        self._device = device
        self._offload = offload
        self._shards: list[Shard] = []

    @property
    def device(self) -> torch.device:
        """The device that workers and solves compute on."""
        return torch.device(self._device)

    def start(self) -> int:
        """Make the shards unless they are there; return how many there are."""
        if not self._shards:
            self._shards = [Shard(self._device, self._cpus, self._offload) for _ in range(self._num_workers)]
        return self._num_workers

    def call(self, worker: int, label: str, method: Callable[..., R], *arguments: Any) -> Held[R]:
        """Call a method of one shard now."""
        return Held(_with_threads(self._cpus, method, self._shards[worker], *map(_value_of, arguments)))

    def call_all(self, method: Callable[[Shard], R]) -> list[R]:
        """Call a method of every shard."""
        return [method(shard) for shard in self._shards]

    def call_living(self, method: Callable[[Shard], R]) -> list[R]:
        """Call a method of every shard: none can be lost."""
        return self.call_all(method)

    def solve(self, label: str, function: Callable[..., R], *arguments: Any) -> Held[R]:
        """Run a function now."""
        return Held(_with_threads(solve_threads(self._cpus), function, *map(_value_of, arguments)))

    def put(self, value: T) -> Held[T]:
        """Hold a value."""
        return Held(value)

    def get(self, references: Sequence[Reference[T]]) -> list[T]:
        """Return the values of references."""
        return [_value_of(reference) for reference in references]

    def lose(self) -> None:
        """Drop all shards."""
        self.close()

    def close(self) -> None:
        """Drop all shards."""
        self._shards = []


def _value_of(argument: Any) -> Any:
    return argument.value if isinstance(argument, Held) else argument


def _with_threads(number: int, function: Callable[..., R], *arguments: Any) -> R:
    """Call a function that computes with a number of threads, as a process of its own would."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(number, os.cpu_count() or 1))
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)
