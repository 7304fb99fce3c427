"""Describes a cluster's resources and plans how a run's workers share them, without Ray."""

from dataclasses import dataclass

from cluster.errors import ClusterError

# On CPUs a worker uses a group of cores: this needs fewer copies of the hidden layer's weights and of the moments.
CPUS_PER_WORKER = 4


@dataclass(frozen=True)
class Node:
    """The resources of one node."""

    cpus: int
    gpus: int
    # Ray's id of the node, and its address.
    node_id: str = ""
    address: str = ""
    # Whether this program runs on it.
    here: bool = False


@dataclass(frozen=True)
class Resources:
    """The resources of a cluster, node by node."""

    nodes: tuple[Node, ...]
    # Whether every node is the driver's own, and so sees its files.
    local: bool = True

    @property
    def cpus(self) -> int:
        """The number of CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """The number of GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def weights_travel(self, shared_storage: bool) -> bool:
        """Return whether the driver must send weights, because not every node sees its paths."""
        return not (self.local or shared_storage)

    def room(self, cpus: int, gpus: float) -> int:
        """Return how many workers fit on the nodes, each with `cpus` CPUs and `gpus` GPUs."""
        return sum(min(node.cpus // cpus, int(node.gpus / gpus) if gpus else node.cpus) for node in self.nodes)


@dataclass(frozen=True)
class WorkerPlan:
    """The number of workers, the resources of each, and whether Ray sends the model's weights to them."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    weights_travel: bool


def plan_workers(
    resources: Resources, num_workers: int | None, gpus_per_worker: float | None, shared_storage: bool = False
) -> WorkerPlan:
    """Plan the workers and their resources: by default one per GPU if there are any, else one per 4 cores.

    Args:
        resources: The cluster's resources.
        num_workers: The requested number of workers, or None.
        gpus_per_worker: The requested GPUs per worker, or None.
        shared_storage: Whether every node sees the driver's paths.

    Raises:
        ClusterError: The cluster has less than was requested.
    """
    gpus_per_worker = _gpus_of_each(resources, gpus_per_worker)
    room = resources.room(1, gpus_per_worker)
    if num_workers is None:
        by_cores = max(1, sum(node.cpus // CPUS_PER_WORKER for node in resources.nodes))
        num_workers = room if gpus_per_worker else by_cores
    if not 0 < num_workers <= room:
        raise ClusterError(
            f"{max(num_workers, 1)} workers of {gpus_per_worker:g} GPUs were asked for, the cluster has room for "
            f"{room}: {len(resources.nodes)} node(s) with {resources.cpus} CPUs and {resources.gpus} GPUs; "
            f"lower --workers or --gpus-per-worker (0 computes on CPUs)"
        )
    # A worker on a GPU takes that GPU's share of the CPUs, which leaves another run CPUs for the other GPUs.
    cpus = resources.cpus // (room if gpus_per_worker else num_workers)
    while resources.room(cpus, gpus_per_worker) < num_workers:
        cpus -= 1
    return WorkerPlan(num_workers, cpus, gpus_per_worker, weights_travel=resources.weights_travel(shared_storage))


def find_lacking(
    resources: Resources, num_workers: int | None, gpus_per_worker: float | None, settled: WorkerPlan | None = None
) -> list[dict[str, float]]:
    """Return the bundles of the workers that a cluster should have room for, if it would be refused as it is.

    Args:
        resources: The cluster's resources.
        num_workers: The requested number of workers, or None.
        gpus_per_worker: The requested GPUs per worker, or None.
        settled: The plan of a run that is resumed, which needs room for one of its workers.

    Returns:
        A bundle of Ray's resources for each worker; none if the cluster has room.
    """
    if settled is None:
        least = num_workers = num_workers or 1
        cpus, gpus = 1, _gpus_of_each(resources, gpus_per_worker)
    else:
        least, num_workers = 1, settled.num_workers
        cpus, gpus = settled.cpus_per_worker, settled.gpus_per_worker
    if resources.room(cpus, gpus) >= least:
        return []
    return [{"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {}) for _ in range(num_workers)]


def _gpus_of_each(resources: Resources, gpus_per_worker: float | None) -> float:
    if gpus_per_worker is None:
        return 1.0 if resources.gpus else 0.0
    return gpus_per_worker


def find_room(resources: Resources, workers: WorkerPlan) -> int:
    """Return how many of a plan's workers fit on the cluster, which may have shrunk since the plan was made.

    Raises:
        ClusterError: None of them fits.
    """
    room = resources.room(workers.cpus_per_worker, workers.gpus_per_worker)
    if not room:
        raise ClusterError(
            f"the run has workers of {workers.cpus_per_worker} CPUs and {workers.gpus_per_worker:g} GPUs, and no node "
            f"has that many: {len(resources.nodes)} node(s) with {resources.cpus} CPUs and {resources.gpus} GPUs; "
            f"resume it on nodes like those it began on, or start again"
        )
    return min(room, workers.num_workers)


def spread_workers(resources: Resources, workers: WorkerPlan) -> list[int]:
    """Return how many of a plan's workers each node will likely get: they are dealt out in turns, as Ray does."""
    rooms = [Resources((node,)).room(workers.cpus_per_worker, workers.gpus_per_worker) for node in resources.nodes]
    counts = [0] * len(rooms)
    left = min(workers.num_workers, sum(rooms))
    while left:
        for number in [number for number, room in enumerate(rooms) if counts[number] < room][:left]:
            counts[number] += 1
            left -= 1
    return counts
