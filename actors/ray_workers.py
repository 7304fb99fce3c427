"""Workers on Ray: an actor for each `Shard`, and tasks for solves, in a run's share of the cluster."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import torch

from actors.errors import ShardError
from actors.placement import START_SECONDS, Placement
from actors.shard import Shard
from actors.waiting import get_in_order, require_head, which_answer
from actors.workers import Reference

T = TypeVar("T")
R = TypeVar("R")

# How long to wait for lost workers while there are others, which can take over their data.
REPLACE_SECONDS = 30.0


class RayWorkers:
    """Workers on a Ray cluster (see `actors.workers.Workers`).

    Args:
        placement: Where they run.
        offload: Whether they hold hidden states in files.
        note: Receives a line when workers are missing.
    """

    def __init__(
        self, placement: Placement, *, offload: bool = False, note: Callable[[str], None] = lambda text: None
    ) -> None:
        self._placement = placement
        self._offload = offload
        self._note = note
        self._actors: list[Any] = []
        self._lost = False

    @property
    def device(self) -> torch.device:
        """The device that workers and solves compute on."""
        return torch.device(self._placement.device)

    def start(self) -> int:
        """Start the actors and wait until they are placed, unless they run; return how many there are.

        Raises:
            ShardError: They were not placed in time; after a loss, none was.
        """
        if not self._actors and self._lost:
            self._start_some()
        elif not self._actors:
            self._actors = self._submit_actors()
            get_in_order([actor.peak_memory.remote() for actor in self._actors], START_SECONDS)
        return len(self._actors)

    def call(self, worker: int, label: str, method: Callable[..., R], *arguments: Any) -> Reference[R]:
        """Call a method of one actor without waiting; the name of the process begins with `ray::Shard`."""
        return getattr(self._actors[worker], method.__name__).options(name=f"Shard: {label}").remote(*arguments)

    def call_all(self, method: Callable[[Shard], R]) -> list[R]:
        """Call a method of every actor; return the results in the order of the actors."""
        return get_in_order(self._call_each(method))

    def call_living(self, method: Callable[[Shard], R]) -> list[R]:
        """Call a method of every actor; leave out those that are lost or do not answer within half a minute."""
        calls = self._call_each(method)
        answers = which_answer(calls, REPLACE_SECONDS)
        return [ray.get(call) for call, answered in zip(calls, answers, strict=True) if answered]

    def solve(self, label: str, function: Callable[..., R], *arguments: Any) -> Reference[R]:
        """Run a pure function as a task; Ray runs it again if its node is lost."""
        options = self._placement.solve_options()
        remote: Any = ray.remote(max_retries=3)(function).options(name=label, **options)
        return remote.remote(*arguments)

    def put(self, value: T) -> Reference[T]:
        """Put a value into Ray's object store."""
        reference: Any = ray.put(value)
        return reference

    def get(self, references: Sequence[Reference[T]]) -> list[T]:
        """Wait for results and return them in order."""
        waiting: list[Any] = list(references)
        return get_in_order(waiting)

    def lose(self) -> None:
        """End all actors after one was lost; fewer may start next.

        Raises:
            HeadLostError: Ray's head is lost.
        """
        require_head()
        self.close()
        self._lost = True

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _call_each(self, method: Callable[[Shard], Any]) -> list[Any]:
        return [getattr(actor, method.__name__).remote() for actor in self._actors]

    def _start_some(self) -> None:
        """Start all actors that can be placed within half a minute; wait longer while there are none."""
        require_head()
        deadline = time.monotonic() + START_SECONDS
        placed = self._placed(self._submit_actors(), deadline)
        while not placed and time.monotonic() < deadline:
            # All died as they started. Perhaps the cause is the same as before, and is over by now.
            placed = self._placed(self._submit_actors(), deadline)
        if not placed:
            raise ShardError(
                f"no worker was placed within {START_SECONDS:.0f} s of the loss: "
                f"is there a node left with {self._placement.cpus_per_worker} CPUs?"
            )
        if len(placed) < self._placement.num_workers:
            self._note(
                f"{len(placed)} of {self._placement.num_workers} workers were placed; "
                f"they take over the data of the others"
            )
        self._actors = placed

    def _placed(self, actors: list[Any], deadline: float) -> list[Any]:
        """Return the actors that answer within half a minute of the first answer; end the others."""
        pings = [actor.peak_memory.remote() for actor in actors]
        answers = which_answer(pings, REPLACE_SECONDS)
        while None in answers and not any(answers) and time.monotonic() < deadline:
            answers = which_answer(pings, REPLACE_SECONDS)
        for actor, answered in zip(actors, answers, strict=True):
            if not answered:
                ray.kill(actor)
        return [actor for actor, answered in zip(actors, answers, strict=True) if answered]

    def _submit_actors(self) -> list[Any]:
        # Ray must not restart an actor: it would come back without its states.
        remote = ray.remote(max_restarts=0, max_task_retries=0)(Shard)
        place = self._placement
        return [
            remote.options(**place.worker_options(number)).remote(place.device, place.cpus_per_worker, self._offload)
            for number in range(place.num_workers)
        ]
