"""Where workers and solves run: a bundle of CPUs and a GPU for each worker, spread over the nodes."""

from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.errors import ShardError
from actors.waiting import head_answers
from actors.workers import held_cpus

START_SECONDS = 180.0
NOTE_SECONDS = 5.0


class Placement:
    """A run's share of the cluster, held from the first use until the context ends.

    Solves run beside the workers. So Ray's books give a worker half of its bundle, although it computes with the whole,
    and give solves the other half: a bundle runs one worker and one solve at a time.

    Args:
        num_workers: The number of bundles.
        cpus_per_worker: CPUs of each bundle.
        gpus_per_worker: GPUs of each bundle, from 0 to 1.
        note: Receives a line when the run has to wait for other runs.
    """

    def __init__(
        self,
        num_workers: int,
        cpus_per_worker: int,
        gpus_per_worker: float,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.num_workers = num_workers
        self.cpus_per_worker = cpus_per_worker
        self.device = "cuda" if gpus_per_worker else "cpu"
        self._gpus = gpus_per_worker
        self._note = note
        self._group: Any = None

    @property
    def worker_cpus(self) -> float:
        """The CPUs that a worker holds in Ray's books."""
        return held_cpus(self.cpus_per_worker)

    def worker_options(self, number: int) -> dict[str, Any]:
        """Return a worker's options for Ray: its resources, and the bundle that they come from."""
        return self._options(self.worker_cpus, number)

    def solve_options(self) -> dict[str, Any]:
        """Return a solve's options for Ray: its resources, from any bundle that has them free."""
        return self._options(self.cpus_per_worker - self.worker_cpus, -1)

    def __enter__(self) -> "Placement":
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the bundles back and end everything that runs in them."""
        # If the head is gone, Ray would ask it for a minute and then end this process.
        if self._group is not None and head_answers():
            remove_placement_group(self._group)
        self._group = None

    def _options(self, cpus: float, bundle: int) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self._reserved(), placement_group_bundle_index=bundle)
        return {"num_cpus": cpus, "num_gpus": self._gpus / 2, "scheduling_strategy": strategy}

    def _reserved(self) -> Any:
        """Return the bundles; reserve them on the first call.

        Raises:
            ShardError: The cluster did not give them in time.
        """
        if self._group is None:
            bundle = {"CPU": float(self.cpus_per_worker)} | ({"GPU": self._gpus} if self._gpus else {})
            group = placement_group([bundle] * self.num_workers, strategy="SPREAD")
            asked = f"{self.num_workers} workers of {self.cpus_per_worker} CPUs and {self._gpus:g} GPUs"
            placed = group.wait(min(NOTE_SECONDS, START_SECONDS))
            if not placed:
                self._note(f"waiting for up to {START_SECONDS:.0f} s for room for {asked}: another run has it")
                placed = group.wait(START_SECONDS)
            if not placed:
                remove_placement_group(group)
                raise ShardError(
                    f"the cluster gave no room for {asked} within {START_SECONDS:.0f} s; "
                    f"{ray.available_resources()} are free: wait for other runs to end, or lower --workers or "
                    f"--gpus-per-worker"
                )
            self._group = group
        return self._group
