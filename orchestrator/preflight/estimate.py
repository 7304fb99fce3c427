"""What a run will need, told before anything is computed: memory and seconds by stage, disk, and travel."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage of a run will likely take; its name is that by which the run reports its seconds.

    Attributes:
        name: the stage.
        worker: bytes of a worker at its peak, its libraries included; on a GPU, those of the GPU; 0 where none works.
        required: bytes without which a worker refuses the stage, above its libraries.
        solve: bytes of a task that solves, its libraries included; 0 where there is none.
        driver: bytes of the driver.
        seconds: in all; None where no rate is known.
    """

    name: str
    worker: int = 0
    required: int = 0
    solve: int = 0
    driver: int = 0
    seconds: float | None = None

    def describe(self) -> str:
        """Return it in a line."""
        sizes = {"worker": self.worker, "solve": self.solve, "driver": self.driver}
        parts = [f"{name} {readable(size)}" for name, size in sizes.items() if size]
        return f"{self.name}: " + ", ".join(parts + ([] if self.seconds is None else [f"{self.seconds:.1f} s"]))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will likely take.

    Attributes:
        stages: in the order in which they come.
        num_workers: how many workers there are.
        device: where they compute, "cpu" or "cuda".
        shared: bytes of moments on their way, in Ray's object store, of all nodes together.
        output: bytes of the result on the disk.
        beside: bytes beside it as long as the run goes on.
        tracked: bytes that MLflow is given.
        spilled: bytes that each worker holds in files.
        weights: bytes of weights that are sent to each node but the driver's.
        moments: bytes of moments that travel between workers.
        tokens: bytes of tokens that are sent to workers.
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
        """Bytes of a worker at its peak."""
        return max(stage.worker for stage in self.stages)

    @property
    def required(self) -> int:
        """Bytes above its libraries without which a worker refuses to begin."""
        return max(stage.required for stage in self.stages)

    @property
    def solve(self) -> int:
        """Bytes of a solve at its peak."""
        return max(stage.solve for stage in self.stages)

    @property
    def driver(self) -> int:
        """Bytes of the driver at its peak."""
        return max(stage.driver for stage in self.stages)

    @property
    def further_driver(self) -> int:
        """Bytes of the driver above those that it takes before it begins."""
        return self.driver - self.stages[0].driver

    @property
    def seconds(self) -> float | None:
        """Seconds in all, if they can be told."""
        seconds = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(seconds) if seconds else None

    def lines(self) -> list[str]:
        """Return it in a few lines."""
        solves = f", solves of {readable(self.solve)}" if self.solve else ""
        where = "of its GPU" if self.device == "cuda" else "of memory"
        memory = (
            f"{self.num_workers} worker(s) with {readable(self.worker)} {where}{solves}, driver {readable(self.driver)}"
        )
        beside = f", and {readable(self.beside)} while it runs" if self.beside else ""
        lines = [f"{memory}; {readable(self.output)} on the disk{beside}"]
        if self.seconds is not None:
            parts = [f"{stage.name} {stage.seconds:.0f}" for stage in self.stages if (stage.seconds or 0) >= 1]
            lines.append(f"very roughly {self.seconds:.0f} s: {', '.join(parts)}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return all of it, as JSON has it."""
        totals = {name: getattr(self, name) for name in ("worker", "solve", "driver", "seconds")}
        return asdict(self) | totals


def readable(num_bytes: float) -> str:
    """Return bytes as people read them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
