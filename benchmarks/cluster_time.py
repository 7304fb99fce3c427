"""Predicts a run's time on a cluster, and checks the formula on this machine: `python -m benchmarks.cluster_time`.

For each layer, with N tokens over W workers, n = N / W:

    observing   n (forward + sums) / (e R)              e: the share of a plain product's rate R that observing reaches
    reducing    ceil(log2 W) triangle / M               M: bytes per second through one merge, transfer included
    solving     2 P^3 (3 + D / P) / (s S) + P step      s: the share of the rate S, in the solves' dtype
    reading     layer / I                               layers are read ahead, so it counts only if it takes longest

`gram` takes one layer after the other, while solves run in W places: L max(observing + reducing, reading, solving / W),
plus the last solve. `slimllm` makes a pass for the similarities. Then observing, reducing and deciding wait for each
other, module by module: L (forward + observing + reducing + deciding). Its sums are the moments of the attention and of
the MLP's output, and it passes the removed channels once more. Deciding is an eigen-decomposition of D x D, counted as
10 D^3, and a product of P x D with D x D.

The first row is this machine, at rates measured here, with the measured seconds of one process, where solves wait for
observing. The other rows are up to 4 nodes with 8 GPUs each. Their rates are assumed; options change them.
"""

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from benchmarks.machine import describe_machine, figure, write_table
from benchmarks.one_process import prune_timed, rates_of
from benchmarks.operations import (
    OBSERVING_SHARE,
    SOLVING_SHARE,
    decision_operations,
    elimination_operations,
    forward_operations,
    moment_operations,
)
from benchmarks.random_model import SEVEN, Shape, shape_options, write_model
from benchmarks.random_tokens import write_tokens
from slimllm_ops.checkpoint.reading import Checkpoint

BLOCK, BLOCKS = 2048, 128
# The share of the channels that the paper's method removes in the table.
REMOVED = 0.2
SEVENTY = Shape(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8)


@dataclass(frozen=True)
class Rates:
    """A worker's rates per second: products and solves in operations, merges and reading in bytes."""

    products: float
    solves: float
    merges: float
    reading: float
    value_bytes: int
    sum_bytes: int
    step_seconds: float
    observing_share: float = OBSERVING_SHARE
    solving_share: float = SOLVING_SHARE


# Assumed for one H100: half its dense bfloat16 peak for large products, half its float32 peak, and a 100 Gbit/s network
# that a merge crosses twice, by way of the host's memory.
# A step of an elimination is 8 kernels, which take longer to launch than to run.
H100 = Rates(products=400e12, solves=30e12, merges=2e9, reading=5e9, value_bytes=2, sum_bytes=4, step_seconds=8 * 6e-6)


@dataclass(frozen=True)
class Parts:
    """Seconds of each part of one layer."""

    forward: float
    observing: float
    reducing: float
    solving: float
    deciding: float
    reading: float


def gram_parts(shape: Shape, tokens: int, workers: int, rates: Rates) -> Parts:
    """Return the seconds of one layer of `gram`, part by part."""
    moments = moment_operations(shape.hidden) + moment_operations(shape.intermediate)
    return _parts(shape, tokens, workers, rates, sums=moments, widths=(shape.hidden, shape.intermediate))


def slimllm_parts(shape: Shape, tokens: int, workers: int, rates: Rates) -> Parts:
    """Return the seconds of one layer of the paper's method, part by part."""
    removed = 2 * REMOVED * shape.intermediate * shape.hidden
    sums = 2 * moment_operations(shape.hidden) + removed
    return _parts(shape, tokens, workers, rates, sums=sums, widths=(shape.hidden, shape.hidden))


def _parts(shape: Shape, tokens: int, workers: int, rates: Rates, *, sums: float, widths: tuple[int, int]) -> Parts:
    """Return the seconds of one layer, for operations per token beside the pass, and moments of these widths."""
    hidden, channels = shape.hidden, shape.intermediate
    forward = forward_operations(shape.layer_parameters, BLOCK, hidden)
    rate = rates.products * rates.observing_share / (tokens / workers)
    triangle = rates.sum_bytes * sum(width**2 for width in widths) * 9 / 16
    return Parts(
        forward=forward / rate,
        observing=(forward + sums) / rate,
        reducing=math.ceil(math.log2(workers)) * triangle / rates.merges,
        solving=elimination_operations(channels, hidden) / (rates.solves * rates.solving_share)
        + channels * rates.step_seconds,
        deciding=decision_operations(channels, hidden) / (rates.solves * rates.solving_share),
        reading=rates.value_bytes * shape.layer_parameters / rates.reading,
    )


def gram_seconds(shape: Shape, workers: int, parts: Parts) -> float:
    """Return the seconds of gram's pass and its solves."""
    layer = max(parts.observing + parts.reducing, parts.reading, parts.solving / workers)
    return shape.layers * layer + parts.solving


def slimllm_seconds(shape: Shape, parts: Parts) -> float:
    """Return the seconds of both passes of the paper's method."""
    passes = max(parts.forward, parts.reading), max(parts.observing + parts.reducing + parts.deciding, parts.reading)
    return shape.layers * sum(passes)


@click.command()
@shape_options(Shape(hidden=1024, intermediate=2816, layers=3, heads=16, kv_heads=4), "the model measured here")
@click.option("--blocks", default=4, help="Blocks of 2048 tokens, for the same model.")
@click.option("--output", type=Path, default=Path("benchmarks/results/cluster_time.md"))
@click.option("--products", default=H100.products / 1e12, help="bfloat16 TFLOP/s of a GPU.")
@click.option("--solves", default=H100.solves / 1e12, help="float32 TFLOP/s of a GPU.")
@click.option("--merges", default=H100.merges / 1e9, help="GB/s through a merge.")
@click.option("--reading", default=H100.reading / 1e9, help="GB/s of weights to a worker.")
def main(
    shape: Shape,
    blocks: int,
    output: Path,
    products: float,
    solves: float,
    merges: float,
    reading: float,
) -> None:
    """Check the formula on this machine, and write what it predicts for a cluster."""
    rates = replace(H100, products=products * 1e12, solves=solves * 1e12, merges=merges * 1e9, reading=reading * 1e9)
    gram = ("gram: observing", "gram: reducing", "solving", "gram, s")
    slimllm = ("slimllm: observing", "slimllm: reducing", "deciding", "slimllm, s")
    rows = [["run", *gram, *slimllm, "measured, s"]]
    rows.append(_check(shape, blocks))
    for name, large in (("7B", SEVEN), ("70B", SEVENTY)):
        for workers in (1, 8, 32):
            rows.append(_row(f"{name} on {workers} GPU(s), assumed", large, BLOCKS * BLOCK, workers, rates))
    title = f"Predicted time: seconds per layer and in total, {BLOCKS} x {BLOCK} tokens on GPUs"
    write_table(output, title, describe_machine(), rows)


def _check(small: Shape, blocks: int) -> list[str]:
    """Return the row of this machine: predicted and measured seconds of one process."""
    device = torch.device("cpu")
    plain = rates_of(device)
    rates = Rates(
        products=plain[torch.float32],
        solves=plain[torch.float64],
        merges=1e9,
        reading=1e9,
        value_bytes=4,
        sum_bytes=8,
        step_seconds=0.0,
    )
    parts = gram_parts(small, blocks * BLOCK, 1, rates)
    gram, slimllm = _measure(small, blocks, device)
    # In one process, solves wait for observing: take the sum, not the maximum.
    alone = small.layers * (parts.observing + parts.solving)
    name = f"here: hidden {small.hidden}, {small.layers} layers, {blocks} x {BLOCK} tokens, 1 worker"
    row = _row(name, small, blocks * BLOCK, 1, rates, f"gram {figure(gram)}, slimllm {figure(slimllm)}")
    row[4] = figure(alone)
    return row


def _measure(small: Shape, blocks: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds of gram and of slimllm in one process: passes and decisions, without reading and writing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Checkpoint.open(write_model(Path(folder) / "model", small))
        tokens = write_tokens(Path(folder) / "tokens.parquet", blocks, BLOCK, source.config.vocab_size)
        gram = prune_timed(source, tokens, "gram", (0.2,), Path(folder) / "gram", device)
        slimllm = prune_timed(source, tokens, "slimllm", (0.2,), Path(folder) / "slimllm", device)
    stages = ("similarities", "observing", "applying", "deciding heads", "deciding channels")
    return gram["observing"] + gram["eliminating"], sum(slimllm[stage] for stage in stages)


def _row(name: str, shape: Shape, tokens: int, workers: int, rates: Rates, measured: str = "") -> list[str]:
    gram, slimllm = (parts_of(shape, tokens, workers, rates) for parts_of in (gram_parts, slimllm_parts))
    one_pass = (gram.observing, gram.reducing, gram.solving)
    layerwise = (slimllm.observing, slimllm.reducing, slimllm.deciding)
    totals = (gram_seconds(shape, workers, gram), slimllm_seconds(shape, slimllm))
    cells = [
        [*(f"{value:.3f}" for value in seconds), f"{total:.1f}"]
        for seconds, total in zip((one_pass, layerwise), totals, strict=True)
    ]
    return [name, *cells[0], *cells[1], measured]


if __name__ == "__main__":
    main()
