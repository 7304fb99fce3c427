"""Where shards and solves run. Two kinds of workers follow this protocol: actors on Ray, and this process.

    ray_workers.py    RayWorkers: an actor for each worker, tasks for solves
    local.py          LocalWorkers: the same in one process, with no Ray

`ShardGroup` (group.py) and `SolverPool` (pool.py) are written once, over this protocol.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from actors.shard import Shard
from slimllm_ops.moments.moments import merge_tree

T = TypeVar("T")
R = TypeVar("R")


class Reference(Generic[T]):
    """A result that stays where it was computed.

    This class is a name for type checkers: Ray has its own references, and so has this process.
    """


class Workers(Protocol):
    """Workers that hold one `Shard` object each, and processors that run solves."""

    @property
    def device(self) -> torch.device:
        """The device that workers and solves compute on."""

    def start(self) -> int:
        """Start the workers unless they run already; return how many there are."""

    def call(self, worker: int, label: str, method: Callable[..., R], *arguments: Any) -> Reference[R]:
        """Call a method of one worker's `Shard` without waiting.

        Args:
            worker: The worker's number.
            label: What Ray's dashboard calls the work.
            method: The method, such as `Shard.run`.
            arguments: Its arguments; a reference stands for the value it refers to.
        """

    def call_all(self, method: Callable[[Shard], R]) -> list[R]:
        """Call a method of every worker's `Shard`; return the results in the order of the workers."""

    def call_living(self, method: Callable[[Shard], R]) -> list[R]:
        """Call a method of every worker's `Shard`, and leave out workers that are lost; wait half a minute at most."""

    def solve(self, label: str, function: Callable[..., R], *arguments: Any) -> Reference[R]:
        """Run a pure function where a processor is free, without waiting; arguments as in `call`."""

    def put(self, value: T) -> Reference[T]:
        """Send a value once, for any number of calls."""

    def get(self, references: Sequence[Reference[T]]) -> list[T]:
        """Wait for results and return them in order.

        Raises:
            InputError, MiscountError: A worker raised it.
            WorkerLostError: A worker died.
            ShardError: A worker did not answer in time.
        """

    def lose(self) -> None:
        """End all workers after one was lost; fewer may start next."""

    def close(self) -> None:
        """End the workers."""


def merge_on(workers: Workers, holders: list[int], references: list[Reference[R]]) -> Reference[R]:
    """Merge results in a tree, each pair on the worker that holds its left part."""

    def merge(left: tuple[int, Reference[R]], right: tuple[int, Reference[R]]) -> tuple[int, Reference[R]]:
        worker, reference = left
        return worker, workers.call(worker, "merge", Shard.merge, reference, right[1])

    return merge_tree(list(zip(holders, references, strict=True)), merge)[1]


def held_cpus(cpus_per_worker: int) -> float:
    """Return the CPUs that a worker holds in Ray's books; its solves hold the rest.

    Ray knows fractions below one only.
    """
    return cpus_per_worker // 2 if cpus_per_worker > 1 else 0.5


def solve_threads(cpus_per_worker: int) -> int:
    """Return the CPU threads that a solve computes with."""
    return max(1, cpus_per_worker - int(held_cpus(cpus_per_worker)))
