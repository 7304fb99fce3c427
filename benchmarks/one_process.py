"""Times the steps of whole runs in one process, without Ray and MLflow: `python -m benchmarks.one_process`.

The runs are those of `slimllm prune --local --tracking-uri none`, with workers that also time each step. By default
they prune a random checkpoint with a 7B model's shape on 128 x 2048 tokens, on a GPU if there is one: `slimllm` at
20 %, and `gram` at 20, 30 and 50 %. Next to a step's seconds is the share of them that its products would take at the
rate of a plain product on this device.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console

from actors import local
from actors.local import Held, LocalWorkers
from benchmarks.machine import describe_machine, write_table
from benchmarks.operations import LayerOperations, elimination_operations, rate_of_products
from benchmarks.random_model import SEVEN, Shape, shape_options, write_model
from benchmarks.random_tokens import write_tokens
from orchestrator import PruneConfig, prune
from orchestrator.progress import Reporter
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.moments import accumulation_dtype
from slimllm_ops.stream.weights import compute_dtype

R = TypeVar("R")

BLOCK = 2048
HEADINGS = ("step", "seconds", "of the rate of a plain product")
# The table's names of a run's steps, by function; the table leaves out other functions.
STEPS = {
    "forward": "similarities",
    "forward_kept": "sensitivities",
    "backward": "sensitivities",
    "observe": "observing",
    "observe_dense": "observing",
    "decide_heads": "deciding heads",
    "observe_output": "observing",
    "choose_channels_by_output": "deciding channels",
    "decide_experts": "deciding channels",
    "apply": "applying",
    "compare_outputs": "applying",
    "add_recovered": "applying",
    "eliminate_observed": "eliminating",
    "decide_module": "refitting",
}


@dataclass
class Clock:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str, device: torch.device) -> Iterator[None]:
        """Add the seconds spent in the block to a step."""
        start = _now(device)
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + _now(device) - start


class TimedWorkers(LocalWorkers):
    """Workers in this process that time each step."""

    clock = Clock()

    def call(self, worker: int, label: str, method: Callable[..., R], *arguments: Any) -> Held[R]:
        """Call a method of one shard now, and time it."""
        with self.clock.timed(_step_of(label), self.device):
            return super().call(worker, label, method, *arguments)

    def solve(self, label: str, function: Callable[..., R], *arguments: Any) -> Held[R]:
        """Run a function now, and time it."""
        with self.clock.timed(_step_of(label), self.device):
            return super().solve(label, function, *arguments)


@click.command()
@shape_options(SEVEN)
@click.option("--blocks", default=128, help="Blocks of 2048 tokens.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--model", type=Path, help="A checkpoint instead of a random one.")
@click.option("--output", type=Path, default=Path("benchmarks/results/one_process.md"))
def main(
    shape: Shape,
    blocks: int,
    device: str,
    model: Path | None,
    output: Path,
) -> None:
    """Run both methods once and write the table."""
    place = torch.device(device)
    rates = rates_of(place)
    with tempfile.TemporaryDirectory() as folder:
        source = Checkpoint.open(model or write_model(Path(folder) / "model", shape, device))
        rows = [list(HEADINGS), *measure_methods(source, blocks, Path(folder), place, rates)]
    size = (
        f"hidden {shape.hidden}, {shape.layers} layers, intermediate {shape.intermediate}, {shape.heads} heads, "
        f"{shape.kv_heads} KV heads"
    )
    title = f"One process on {device}: {model or size}, {blocks} x {BLOCK} tokens"
    write_table(output, title, f"{describe_machine()}; {rates_told(rates)}", rows)


def measure_methods(
    source: Checkpoint, blocks: int, folder: Path, device: torch.device, rates: dict[torch.dtype, float]
) -> Iterator[list[str]]:
    """Prune a checkpoint by both methods in this process; yield the rows of the table.

    Args:
        source: The checkpoint.
        blocks: The number of blocks to calibrate on.
        folder: Where the tokens and the pruned models go.
        device: Where the layers run.
        rates: The device's rates of plain products.
    """
    tokens = write_tokens(folder / "tokens.parquet", blocks, BLOCK, source.config.vocab_size)
    for name, method, sparsities in (
        ("slimllm, 20 %", "slimllm", (0.2,)),
        ("gram, 20, 30 and 50 %", "gram", (0.2, 0.3, 0.5)),
    ):
        seconds = prune_timed(source, tokens, method, sparsities, folder / method, device)
        yield from rows_of(name, seconds, operations_of(source, blocks * BLOCK, device, method), rates)
        yield [f"{name}: peak memory, GB", _peak(device), ""]


def rates_told(rates: dict[torch.dtype, float]) -> str:
    """Return the rates of plain products in words."""
    plain = ", ".join(f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.2f}" for dtype, rate in rates.items())
    return f"plain products at {plain} TFLOP/s"


def prune_timed(
    source: Checkpoint,
    tokens: Path,
    method: str,
    sparsities: tuple[float, ...],
    output: Path,
    device: torch.device,
) -> dict[str, float]:
    """Prune in this process; return the seconds of each step, and of the whole run."""
    config = PruneConfig(
        model=str(source.directory),
        calibration=str(tokens),
        output=str(output),
        method=method,
        sparsity=sparsities,
        gpus_per_worker=float(device.type == "cuda"),
        local=True,
        tracking_uri="none",
    )
    clock = TimedWorkers.clock = Clock()
    workers, local.LocalWorkers = local.LocalWorkers, TimedWorkers
    try:
        start = time.perf_counter()
        prune(config, Reporter(Console(file=io.StringIO())))
        total = time.perf_counter() - start
    finally:
        local.LocalWorkers = workers
    steps = {step: seconds for step, seconds in clock.seconds.items() if step in STEPS.values()}
    return steps | {"whole run": total}


def rows_of(
    name: str,
    seconds: dict[str, float],
    operations: dict[str, tuple[torch.dtype, float]],
    rates: dict[torch.dtype, float],
) -> list[list[str]]:
    """Return a row of the table for each step of a run."""
    rows = []
    for step, taken in seconds.items():
        dtype, count = operations.get(step, (torch.float32, 0.0))
        rows.append([f"{name}: {step}", f"{taken:.1f}", f"{count / rates[dtype] / taken:.0%}" if count else ""])
    return rows


def operations_of(
    source: Checkpoint, tokens: int, device: torch.device, method: str
) -> dict[str, tuple[torch.dtype, float]]:
    """Return the dtype of the products in each step of a method, and the operations that they take."""
    layer, layers, dtype = LayerOperations.of(source, 0, BLOCK), source.num_layers, compute_dtype(device)
    channels = elimination_operations(source.config.intermediate_size, source.config.hidden_size)
    sums = layer.outputs if method == "slimllm" else layer.moments
    return {
        "similarities": (dtype, tokens * layers * layer.forward),
        "observing": (dtype, tokens * layers * (layer.forward + sums)),
        "eliminating": (accumulation_dtype(device), layers * channels),
    }


def rates_of(device: torch.device) -> dict[torch.dtype, float]:
    """Return the rate of plain products, in operations per second, for the dtypes of layers and of sums."""
    size = 8192 if device.type == "cuda" else 2048
    dtypes = compute_dtype(device), accumulation_dtype(device)
    return {dtype: rate_of_products(device, dtype, size, 5) for dtype in dtypes}


def _step_of(label: str) -> str:
    """Return a call's name in the table, from a label: "layer 3, mlp, observe", or "decide_module layer 3, mlp"."""
    names = {label.rpartition(", ")[2], label.partition(" ")[0]}
    return next((STEPS[name] for name in names if name in STEPS), label)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return "on a CPU: see memory.md"
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return f"{peak / 1e9:.1f}"


if __name__ == "__main__":
    main()
