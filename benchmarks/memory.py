"""Measures the peak memory of every process of a run, by depth, width and tokens: `python -m benchmarks.memory`.

It prunes random bfloat16 checkpoints on one CPU worker, which computes in float32. The libraries' share is the worker's
peak in the same run on a tiny model. Above that, a worker may hold three layers, the moments and the decision in
flight, the hidden states, and the activations of one micro-batch.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from actors.batching import BATCH_TOKENS, MIN_BATCHES
from benchmarks.machine import describe_machine, write_table
from benchmarks.random_model import Shape, write_model
from benchmarks.random_tokens import write_tokens
from benchmarks.sampling import Measured, run_slimllm
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.footprint import Footprint

BLOCK = 2048
NOTHING = Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=256)
NARROW = {
    layers: Shape(hidden=1024, intermediate=2816, layers=layers, heads=16, kv_heads=4) for layers in (4, 11, 22, 44)
}
WIDE = Shape(hidden=2048, intermediate=5632, layers=22, heads=16, kv_heads=4)
# Shape, method, blocks of 2048 tokens, options: by depth, by tokens, by width.
CASES: list[tuple[Any, ...]] = [
    *((NARROW[layers], method, 2) for layers in (11, 44, 22) for method in ("slimllm", "gram")),
    *((NARROW[4], method, blocks) for blocks in (4, 16, 64) for method in ("gram", "slimllm")),
    (WIDE, "slimllm", 2),
    (NARROW[4], "slimllm", 64, "--offload"),
    (WIDE, "gram", 2),
    (NARROW[4], "gram", 64, "--offload"),
]


@click.command()
@click.option(
    "--shape",
    nargs=6,
    type=int,
    help="One model instead of the table's: hidden size, intermediate size, layers, heads, KV heads, vocabulary.",
)
@click.option("--method", default="gram", help="Method, for --shape.")
@click.option("--blocks", default=2, help="Blocks of 2048 tokens, for --shape.")
@click.option("--offload", is_flag=True, help="Prune with --offload, for --shape.")
@click.option("--output", type=Path, default=Path("benchmarks/results/memory.md"))
def main(shape: tuple[int, ...] | None, method: str, blocks: int, offload: bool, output: Path) -> None:
    """Run every case once, or the one of --shape, and write the table."""
    names = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary")
    asked = Shape(**dict(zip(names, shape, strict=True))) if shape else None
    cases = [(asked, method, blocks, *(["--offload"] if offload else []))] if asked else CASES
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = [
            ["model, method, tokens", "worker, MB", "above the libraries", "which may be", "solve, MB", "driver, MB"]
        ]
        for case in cases:
            rows.append(bench.row(*case))
            # Write after each case, so that a later failure loses nothing.
            write_table(output, "Peak private memory by depth, width and tokens", describe_machine(), rows)


class Bench:
    """A folder of checkpoints, tokens and measured runs, each made on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._measured: dict[tuple[Any, ...], Measured] = {}

    def row(self, shape: Shape, method: str, num_blocks: int, *options: str) -> list[str]:
        """Run a case and return its row of the table."""
        base, measured = self._measure(NOTHING, method, 4), self._measure(shape, method, num_blocks, *options)
        above = measured.peak("worker") - base.peak("worker")
        allowed = self._allowed(shape, method, num_blocks * BLOCK if not options else 0)
        sizes = (measured.peak("worker"), above, allowed, measured.peak("solve"), measured.peak("driver"))
        name = f"{shape.hidden} x {shape.layers}, {' '.join((method, *options))}, {num_blocks * BLOCK // 1024}k"
        cells = [f"{size / 1e6:.0f}" if size else "" for size in sizes]
        print(name, cells, flush=True)
        return [name, *cells]

    def _allowed(self, shape: Shape, method: str, tokens: int) -> int:
        """Return the bytes that a worker may take above the libraries."""
        footprint = Footprint.of(self._checkpoint(shape), torch.device("cpu"), deciding=method == "slimllm")
        third_layer = footprint.layers // 2
        at_once = max(BLOCK, min(BATCH_TOKENS, tokens // MIN_BATCHES))
        transient = footprint.activations_per_token * at_once
        return footprint.fixed + third_layer + footprint.states_per_token * tokens + transient

    def _checkpoint(self, shape: Shape) -> Checkpoint:
        directory = self._folder / f"{shape.hidden}-{shape.layers}"
        return Checkpoint.open(directory if directory.exists() else write_model(directory, shape))

    def _measure(self, *case: Any) -> Measured:
        """Return what a case takes; each case runs once."""
        if case not in self._measured:
            self._measured[case] = self._run(*case)
        return self._measured[case]

    def _run(self, shape: Shape, method: str, num_blocks: int, *options: str) -> Measured:
        tokens = self._folder / f"{num_blocks}-{shape.vocabulary}.parquet"
        if not tokens.exists():
            write_tokens(tokens, num_blocks, BLOCK, shape.vocabulary)
        arguments = [
            "prune",
            str(self._checkpoint(shape).directory),
            f"--method={method}",
            f"--calibration={tokens}",
            f"--output={self._folder / 'pruned'}",
            "--overwrite",
            "--workers=1",
            f"--tracking-uri=sqlite:///{self._folder}/mlflow.db",
            *options,
        ]
        return run_slimllm(arguments)


if __name__ == "__main__":
    main()
