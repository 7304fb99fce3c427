"""Holds the estimate of a run: memory by stage, disk, and network traffic.

It tells no seconds: they depend on the machine and on what else runs there. A run measures the time of its layers, and
tells what is left of a stage (`orchestrator.progress`).
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The likely memory of a stage of a run.

    Attributes:
        name: The stage, under the name by which the run reports its seconds.
        worker: Peak bytes of a worker, including its libraries; on a GPU, bytes of the GPU; 0 if no worker runs.
        required: Bytes, without its libraries, that a worker needs to accept the stage.
        solve: Bytes of a solve task, including its libraries; 0 if there is none.
        driver: Bytes of the driver.
    """

    name: str
    worker: int = 0
    required: int = 0
    solve: int = 0
    driver: int = 0

    def describe(self) -> str:
        """Return the stage in one line."""
        sizes = {"worker": self.worker, "solve": self.solve, "driver": self.driver}
        return f"{self.name}: " + ", ".join(f"{name} {readable(size)}" for name, size in sizes.items() if size)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The likely cost of a run.

    Attributes:
        stages: The stages in order.
        num_workers: Number of workers.
        device: Where workers compute, "cpu" or "cuda".
        shared: Bytes of moments in transit in Ray's object store, over all nodes.
        output: Bytes of the result on disk.
        beside: Further bytes on disk while the run goes on.
        tracked: Bytes uploaded to MLflow.
        spilled: Bytes that each worker holds in files.
        weights: Bytes of weights sent to each node except the driver's.
        moments: Bytes of moments sent between workers.
        tokens: Bytes of tokens sent to workers.
    """

    stages: tuple[Stage, ...]
    num_workers: int
    device: str
    shared: int
    output: int
    beside: int
    tracked: int
    spilled: int
    weights: int
    moments: int
    tokens: int

    @property
    def worker(self) -> int:
        """Peak bytes of a worker."""
        return max(stage.worker for stage in self.stages)

    @property
    def required(self) -> int:
        """Bytes, without its libraries, that a worker needs to start."""
        return max(stage.required for stage in self.stages)

    @property
    def solve(self) -> int:
        """Peak bytes of a solve."""
        return max(stage.solve for stage in self.stages)

    @property
    def driver(self) -> int:
        """Peak bytes of the driver."""
        return max(stage.driver for stage in self.stages)

    @property
    def further_driver(self) -> int:
        """Peak bytes of the driver, minus those that it already takes."""
        return self.driver - self.stages[0].driver

    def describe(self) -> str:
        """Return the estimate in one line."""
        solves = f", solves of {readable(self.solve)}" if self.solve else ""
        where = "of its GPU" if self.device == "cuda" else "of memory"
        memory = (
            f"{self.num_workers} worker(s) with {readable(self.worker)} {where}{solves}, driver {readable(self.driver)}"
        )
        beside = f", and {readable(self.beside)} while it runs" if self.beside else ""
        return f"{memory}; {readable(self.output)} on the disk{beside}"

    def as_json(self) -> dict[str, Any]:
        """Return the whole estimate as JSON values."""
        totals = {name: getattr(self, name) for name in ("worker", "solve", "driver")}
        return asdict(self) | totals


def readable(num_bytes: float) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
