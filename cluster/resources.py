"""What a cluster has, and how a run's workers share it. Ray is not needed to know."""

from dataclasses import dataclass

from cluster.errors import ClusterError

# On CPUs one worker computes with a group of cores: fewer copies of the hidden layer's weights and of the moments.
CPUS_PER_WORKER = 4


@dataclass(frozen=True)
class Node:
    """What one node has."""

    cpus: int
    gpus: int
    # What Ray calls it, and its address.
    node_id: str = ""
    address: str = ""
    # Whether this program runs on it.
    here: bool = False


@dataclass(frozen=True)
class Resources:
    """What a cluster has, node by node."""

    nodes: tuple[Node, ...]
    # Whether every node is the driver's own, and so sees its files.
    local: bool = True

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def room(self, cpus: int, gpus: float) -> int:
        """Return how many workers of so many CPUs and GPUs each the nodes have room for."""
        return sum(min(node.cpus // cpus, int(node.gpus / gpus) if gpus else node.cpus) for node in self.nodes)


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers run, what each computes with, and whether the model's weights travel to them through Ray."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    weights_travel: bool


def plan_workers(
    resources: Resources, num_workers: int | None, gpus_per_worker: float | None, shared_storage: bool = False
) -> WorkerPlan:
    """Return how many workers run and what each takes: one per GPU where there are any, else one per 4 cores.

    Args:
        resources: what the cluster has.
        num_workers: how many were asked for, or None.
        gpus_per_worker: what was asked for, or None.
        shared_storage: whether the driver's paths are those of every node.

    Raises:
        ClusterError: the cluster has less than was asked for.
    """
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if resources.gpus else 0.0
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
    # A worker on a GPU has the CPUs that fall to that GPU, so that another run finds its own beside the other GPUs.
    cpus = resources.cpus // (room if gpus_per_worker else num_workers)
    while resources.room(cpus, gpus_per_worker) < num_workers:
        cpus -= 1
    return WorkerPlan(num_workers, cpus, gpus_per_worker, weights_travel=not (resources.local or shared_storage))


def find_room(resources: Resources, workers: WorkerPlan) -> int:
    """Return how many of a plan's workers the cluster has room for, which may be smaller than when it was made.

    Raises:
        ClusterError: it has room for none.
    """
    room = resources.room(workers.cpus_per_worker, workers.gpus_per_worker)
    if not room:
        raise ClusterError(
            f"the run has workers of {workers.cpus_per_worker} CPUs and {workers.gpus_per_worker:g} GPUs, and no node "
            f"has so many: {len(resources.nodes)} node(s) with {resources.cpus} CPUs and {resources.gpus} GPUs; "
            f"resume it on nodes like those it began on, or begin anew"
        )
    return min(room, workers.num_workers)


def spread_workers(resources: Resources, workers: WorkerPlan) -> list[int]:
    """Return how many of a plan's workers each node will likely have: they are dealt out, as Ray spreads them."""
    rooms = [Resources((node,)).room(workers.cpus_per_worker, workers.gpus_per_worker) for node in resources.nodes]
    counts = [0] * len(rooms)
    left = min(workers.num_workers, sum(rooms))
    while left:
        for number in [number for number, room in enumerate(rooms) if counts[number] < room][:left]:
            counts[number] += 1
            left -= 1
    return counts
