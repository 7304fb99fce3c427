"""Where a run computes: on Ray, or in this process (`--local`). A run imports only its own backend."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import actors
import slimllm_ops
from actors.group import Delivery
from actors.workers import Workers
from cluster import Node, Resources, WorkerPlan, find_lacking, plan_workers
from cluster.sockets import require_room_for_sockets
from slimllm_ops.checkpoint.reading import Checkpoint

Note = Callable[[str], None]


@dataclass(frozen=True)
class Growing:
    """What a run needs of a cluster that grows.

    Attributes:
        settled: The workers of a run that is resumed; None for a new run, whose config says what it needs.
        note: Receives a line when the run waits.
    """

    settled: WorkerPlan | None
    note: Note


class Computing(Protocol):
    """The settings of where a run computes, as every config declares them."""

    @property
    def workers(self) -> int | None:
        """The number of workers asked for."""

    @property
    def gpus_per_worker(self) -> float | None:
        """The share of a GPU for each worker."""

    @property
    def local(self) -> bool:
        """Whether the run computes in this process."""

    @property
    def offload(self) -> bool:
        """Whether workers hold hidden states in files."""

    @property
    def shared_storage(self) -> bool:
        """Whether all nodes see the driver's files."""

    @property
    def address(self) -> str | None:
        """The head of a Ray cluster."""


class Backend(Protocol):
    """The machines that a run computes on."""

    def require_place(self) -> None:
        """Check what can be known before the run reads its inputs.

        Raises:
            ClusterError: Ray could not start here.
        """

    def session(self, *, verbose: bool = False, growing: "Growing | None" = None) -> AbstractContextManager[Resources]:
        """Connect, or start a cluster, for the duration of the context; yield the resources.

        Args:
            verbose: Whether to print the logs of Ray and the workers.
            growing: How a cluster that scales itself grows first, if it has no room for the run; None if it should not.

        Raises:
            ClusterError: The cluster cannot be reached.
        """

    def plan_workers(self, resources: Resources) -> WorkerPlan:
        """Return the number of workers, and the CPUs and GPUs of each.

        Raises:
            ClusterError: The cluster has less than the config asks for.
        """

    def weights_travel(self, resources: Resources) -> bool:
        """Return whether the driver must send the weights to the workers."""

    def workers(self, plan: WorkerPlan, room: int, *, note: Note) -> AbstractContextManager[tuple[Workers, Delivery]]:
        """Hold workers for the duration of the context; yield them, and a function that lets them read a checkpoint.

        The workers start with their first stream.

        Args:
            plan: The workers of the run.
            room: How many of them the cluster has room for now.
            note: Receives a line when the run waits for other runs.
        """


def backend_of(config: Computing) -> Backend:
    """Return the backend that a config asks for."""
    return LocalBackend(config) if config.local else RayBackend(config)


class RayBackend:
    """A Ray cluster, or a Ray on this machine."""

    def __init__(self, config: Computing) -> None:
        self._config = config

    def require_place(self) -> None:
        """Check that a Ray that starts here has room for its sockets."""
        from cluster.session import starts_a_ray

        if starts_a_ray(self._config.address):
            require_room_for_sockets()

    @contextmanager
    def session(self, *, verbose: bool = False, growing: Growing | None = None) -> Iterator[Resources]:
        """Connect to the cluster at the config's address, or start a Ray on this machine."""
        from cluster.session import session, starts_a_ray

        alone = starts_a_ray(self._config.address)
        with session(self._config.address, (actors, slimllm_ops), verbose=verbose) as resources:
            if alone or growing is None or not self._lacking(resources, growing):
                yield resources
                return
            with self._grown(growing) as resources:
                yield resources

    def plan_workers(self, resources: Resources) -> WorkerPlan:
        """Return how many workers run: one for each GPU, or one for every 4 cores."""
        config = self._config
        return plan_workers(resources, config.workers, config.gpus_per_worker, config.shared_storage)

    def weights_travel(self, resources: Resources) -> bool:
        """Return whether some node does not see the driver's files."""
        return resources.weights_travel(self._config.shared_storage)

    @contextmanager
    def workers(self, plan: WorkerPlan, room: int, *, note: Note) -> Iterator[tuple[Workers, Delivery]]:
        """Hold a placement on the cluster, and actors in it."""
        from actors.placement import Placement
        from actors.ray_workers import RayWorkers
        from actors.serving import weight_server

        with (
            Placement(room, plan.cpus_per_worker, plan.gpus_per_worker, note) as placement,
            weight_server() if plan.weights_travel else nullcontext(_unchanged) as deliver,
        ):
            yield RayWorkers(placement, offload=self._config.offload, note=note), deliver

    def _lacking(self, resources: Resources, growing: Growing) -> list[dict[str, float]]:
        return find_lacking(resources, self._config.workers, self._config.gpus_per_worker, growing.settled)

    @contextmanager
    def _grown(self, growing: Growing) -> Iterator[Resources]:
        from actors.growing import grown
        from cluster.session import read_resources

        with grown(lambda: self._lacking(read_resources(), growing), growing.note):
            yield read_resources()


class LocalBackend:
    """This process, without Ray."""

    def __init__(self, config: Computing) -> None:
        self._config = config
        self._num_workers = config.workers or 1

    def require_place(self) -> None:
        """Do nothing: this process is there."""

    @contextmanager
    def session(self, *, verbose: bool = False, growing: Growing | None = None) -> Iterator[Resources]:
        """Yield this machine's CPUs, and its first GPU."""
        import torch

        cpus = len(os.sched_getaffinity(0))
        # Shards compute one after the other, so there can be more shards than CPUs.
        yield Resources((Node(max(cpus, self._num_workers), int(torch.cuda.is_available()), here=True),))

    def plan_workers(self, resources: Resources) -> WorkerPlan:
        """Return one worker, or as many as the config asks for; they share the GPU."""
        gpus = self._config.gpus_per_worker
        shared = resources.gpus / self._num_workers if gpus is None else gpus
        return plan_workers(resources, self._num_workers, shared)

    def weights_travel(self, resources: Resources) -> bool:
        """Return False: the worker is this process."""
        return False

    @contextmanager
    def workers(self, plan: WorkerPlan, room: int, *, note: Note) -> Iterator[tuple[Workers, Delivery]]:
        """Hold shards in this process."""
        from actors.local import LocalWorkers

        device = "cuda" if plan.gpus_per_worker else "cpu"
        yield LocalWorkers(plan.num_workers, plan.cpus_per_worker, device, offload=self._config.offload), _unchanged


def _unchanged(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint
