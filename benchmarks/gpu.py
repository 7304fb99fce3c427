"""Checks and times slimllm on one GPU, in at most nine minutes: `make gpu`, or `python -m benchmarks.gpu`.

1. The mathematics: sums over tokens and solves on the GPU, in its precision, against the same on the CPU in float64.
2. Decisions: a small real model pruned on both; which units stay.
3. Speed: both methods on a model of the 7B's shape with random weights (`benchmarks/one_process.py`).

It runs where neither Ray nor MLflow is installed. On a machine without a GPU, `--device cpu` with a small shape runs
the same script, which compares the CPU with itself.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.machine import describe_machine, write_table
from benchmarks.one_process import HEADINGS, measure_methods, rates_of, rates_told
from benchmarks.random_model import SEVEN, Shape, shape_options, write_model
from orchestrator import PruneConfig, prune
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.channels import ChannelStatistics, channel_scores
from slimllm_ops.decide.elimination import eliminate
from slimllm_ops.decide.heads import choose_heads
from slimllm_ops.decide.least_squares import refit
from slimllm_ops.decide.plan import Plan
from slimllm_ops.decide.recovery import fit_line
from slimllm_ops.moments.moments import MomentSum
from slimllm_ops.moments.outputs import OutputPairs
from slimllm_ops.moments.projection import Projection

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
MODEL, CALIBRATION = SHARED / "models" / "lab-llama-11m", SHARED / "golden" / "tokens" / "lab.calibration.parquet"
CPU = torch.device("cpu")
TOKENS, WIDTH, HIDDEN, UNITS = 4096, 512, 256, 8
METHODS = ("slimllm", "gram")


def projection_on(device: torch.device) -> Projection:
    """Return an output projection with the moments of random inputs, summed on a device in its own precision."""
    x_NP, weight_DP = _random(TOKENS, WIDTH), _random(HIDDEN, WIDTH)
    mixed_NP = x_NP @ _random(WIDTH, WIDTH) / WIDTH**0.5 + 3 * _random(1, WIDTH)
    total = MomentSum()
    total.add(mixed_NP.to(device))
    return Projection.of(total.packed().unpack(device), weight_DP.to(device))


def statistics_of(projection: Projection) -> ChannelStatistics:
    """Return what channel scores need of an MLP without projections in."""
    norm_P, norm_D = projection.moments.norm_P, projection.weight_PD.new_ones(HIDDEN)
    return ChannelStatistics(projection.weight_PD, norm_P, projection.output_covariance_DD, norm_D, [])


def kept_half(projection: Projection) -> Tensor:
    """Return the first half of the inputs."""
    return torch.arange(WIDTH // 2, device=projection.weight_PD.device)


def pairs_on(device: torch.device) -> Tensor:
    """Return the sums over two random outputs, made on a device."""
    y_ND = _random(TOKENS, HIDDEN).to(device)
    return torch.from_numpy(OutputPairs.of(0.5 * y_ND + 1, y_ND).sums_5D)


# Each function computes a quantity on a device, to compare it with the CPU's.
MATHEMATICS: dict[str, Callable[[torch.device], Tensor]] = {
    "covariance": lambda device: projection_on(device).covariance_PP,
    "sums over two outputs": pairs_on,
    "scores of heads": lambda device: choose_heads(projection_on(device), num_units=UNITS, num_removed=2).scores_H,
    "scores of channels": lambda device: channel_scores(statistics_of(projection_on(device))),
    "line": lambda device: fit_line(projection := projection_on(device), kept_half(projection)).scale_D,
    "refit": lambda device: refit(projection := projection_on(device), kept_half(projection)).weight_SD,
    "costs of eliminated channels": lambda device: torch.tensor(eliminate(projection_on(device), WIDTH).costs),
    "costs of eliminated heads": lambda device: torch.tensor(eliminate(projection_on(device), UNITS).costs),
}


def compare_mathematics(device: torch.device) -> Iterator[list[str]]:
    """Yield a row for each quantity: its largest difference from the CPU's, over its largest value."""
    for name, compute in MATHEMATICS.items():
        found, expected = (compute(place).double().cpu() for place in (device, CPU))
        yield [name, f"{float((found - expected).abs().max() / expected.abs().max()):.1g}", ""]


def compare_decisions(model: Path, calibration: Path, folder: Path, device: torch.device) -> Iterator[list[str]]:
    """Prune 20 % of a model on the CPU and on a device; yield a row for each method with the units that differ."""
    for method in METHODS:
        settings = {"model": str(model), "calibration": str(calibration), "method": method, "sparsity": 0.2}
        here = _kept(folder / f"{method}-cpu", CPU, settings)
        there = _kept(folder / f"{method}-device", device, settings)
        differing = sum(len(here[module] - there.get(module, set())) for module in here)
        yield [f"{method}: units that differ", f"{differing} of {sum(map(len, here.values()))}", ""]


def _kept(output: Path, device: torch.device, settings: dict[str, Any]) -> dict[str, set[int]]:
    """Prune a model on a device; return the units that stay in each pruned module."""
    gpus = float(device.type == "cuda")
    prune(PruneConfig(**settings, output=str(output), local=True, tracking_uri="none", gpus_per_worker=gpus))
    modules = {}
    for number, layer in enumerate(Plan.read(output / "pruning" / "plan.json").layers):
        modules |= {f"attention {number}": layer.attention, f"MLP {number}": layer.mlp}
    return {name: set(decision.kept) for name, decision in modules.items() if decision}


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@click.command()
@shape_options(SEVEN)
@click.option("--blocks", default=128, help="Blocks of 2048 tokens.")
@click.option("--device", default="cuda", help="The device to check.")
@click.option("--model", type=Path, default=MODEL, help="The small model whose decisions are compared.")
@click.option("--calibration", type=Path, default=CALIBRATION, help="Its calibration text or tokens.")
@click.option("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
def main(shape: Shape, blocks: int, device: str, model: Path, calibration: Path, output: Path) -> None:
    """Check, time, and write the table; each part adds its rows, so a run that is cut off leaves those it made."""
    place, rows = torch.device(device), [["what", "largest difference, or seconds", HEADINGS[2]]]
    rates = rates_of(place)
    size = f"hidden {shape.hidden}, {shape.layers} layers, intermediate {shape.intermediate}, {blocks} x 2048 tokens"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        source = Checkpoint.open(write_model(folder / "model", shape, device))
        for part in (
            compare_mathematics(place),
            compare_decisions(model, calibration, folder, place),
            measure_methods(source, blocks, folder, place, rates),
        ):
            rows += part
            write_table(output, f"One GPU: {size}", f"{describe_machine()}; {rates_told(rates)}", rows)


if __name__ == "__main__":
    main()
