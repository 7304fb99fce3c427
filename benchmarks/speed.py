"""Times one layer's decisions from moments against the published code's algorithm: `python -m benchmarks.speed`.

It draws random correlated activations of 4096 tokens and 16 heads; hidden 1024 with 2816 channels, then twice as wide.
Both sides start from the activations, make the same decisions (checked) and fit the recovery. The published method has
no elimination, so ours is measured against a plain product of the same size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import torch
from torch.nn import functional

from benchmarks.machine import describe_machine, figure, write_table
from benchmarks.naive import prune_channels, prune_heads
from slimllm_ops.decide import elimination
from slimllm_ops.decide.paper import choose_channels_by_output, decide_heads, recover_output
from slimllm_ops.models.families import FAMILIES, Family, LayerShape
from slimllm_ops.moments.moments import Moments
from slimllm_ops.moments.observation import ObservationSum, PackedObservation
from slimllm_ops.moments.outputs import OutputPairs, OutputSum
from slimllm_ops.moments.projection import Projection
from slimllm_ops.stream.outputs import output_of

T = TypeVar("T")

SHAPES = ((1024, 2816), (2048, 5632))
LLAMA = FAMILIES[0]
ATTENTION, MLP = LLAMA.branches


@dataclass(frozen=True)
class OneLayer:
    """A model of one layer, with the attributes that the paper's decisions read."""

    tensors: dict[str, torch.Tensor]
    num_units: int
    family: Family = LLAMA

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the layer's tensors."""
        return self.tensors

    def shape(self, layer: int) -> LayerShape:
        """Return the layer's head counts; nothing here reads its channels."""
        return LayerShape(self.num_units, self.num_units, 0, self.num_units)


@click.command()
@click.option(
    "--shape", "shapes", nargs=2, type=int, multiple=True, default=SHAPES, help="Hidden size and channels; repeatable."
)
@click.option("--tokens", default=4096)
@click.option("--heads", default=16)
@click.option("--output", type=Path, default=Path("benchmarks/results/speed.md"))
def main(shapes: tuple[tuple[int, int], ...], tokens: int, heads: int, output: Path) -> None:
    """Measure every step once per shape and write the table."""
    rows = [["step", "published algorithm, s", "from sums, s", "ratio"]]
    for hidden, channels in shapes:
        rows.append(_measure_heads(hidden, heads, tokens))
        rows.append(_measure_channels(hidden, channels, tokens))
        rows.append(_measure_elimination(hidden, channels, tokens))
    write_table(output, "One layer: from sums over tokens against the published algorithm", describe_machine(), rows)


def _measure_heads(hidden: int, heads: int, tokens: int) -> list[str]:
    x_NP, input_ND, weight_PD = _activations(hidden, tokens), _activations(hidden, tokens), _weights(hidden, hidden)
    slow, plain = _timed(lambda: prune_heads(x_NP, weight_PD, heads, heads // 4))
    tensors = {ATTENTION.output_weight: torch.from_numpy(weight_PD.T.copy())}

    def by_moments() -> list[int]:
        observed = _observe(x_NP, input_ND)
        return list(decide_heads(OneLayer(tensors, heads), observed, 0, num_removed=heads // 4).kept)

    return _row(f"attention, hidden {hidden}", slow, plain, by_moments)


def _measure_channels(hidden: int, channels: int, tokens: int) -> list[str]:
    x_NP, input_ND = _activations(channels, tokens), _activations(hidden, tokens)
    weight_PD, gate_PD, up_PD = _weights(channels, hidden), _weights(channels, hidden), _weights(channels, hidden)
    num_removed = channels // 5
    slow, plain = _timed(lambda: prune_channels(x_NP, weight_PD, input_ND, (gate_PD, up_PD), num_removed))
    into = dict(zip(MLP.input_weights, map(torch.from_numpy, (gate_PD, up_PD)), strict=True))
    weight_DP = torch.from_numpy(weight_PD.T.copy())
    layer = OneLayer(into | {MLP.output_weight: weight_DP}, num_units=1)

    def by_outputs() -> list[int]:
        x, seen = torch.from_numpy(x_NP), OutputSum(intercept=True)
        y = functional.linear(x, weight_DP)
        seen.add(x, torch.from_numpy(input_ND), y)
        chosen = choose_channels_by_output(layer, seen.packed(), 0, num_removed=num_removed, keep_lowest=0.01)
        z = output_of(chosen.kept, weight_DP)(x, y)
        return list(recover_output(OutputPairs.of(z, y), chosen).kept)

    return _row(f"MLP, hidden {hidden}, {channels} channels", slow, plain, by_outputs)


def _measure_elimination(hidden: int, channels: int, tokens: int) -> list[str]:
    """Measure the whole elimination path against the machine's rate of float64 products."""
    moments = Moments.of(torch.from_numpy(_activations(channels, tokens)))
    projection = Projection.of(moments, torch.from_numpy(_weights(channels, hidden).T.copy()))
    seconds, _ = _timed(lambda: elimination.eliminate(projection, channels))
    square = torch.rand(channels, channels, dtype=torch.float64)
    product_seconds, _ = _timed(lambda: square @ square)
    # A^-1, W W^T, and the block updates of both while the set shrinks to nothing: 1 + D / P + 2 products.
    work = 3 + hidden / channels
    share = work * product_seconds / seconds
    return [f"elimination of {channels} channels", "", figure(seconds), f"{share:.0%} of the GEMM rate"]


def _observe(x_NP: np.ndarray, input_ND: np.ndarray) -> PackedObservation:
    """Return what a worker sends for a branch's activations."""
    observed = ObservationSum()
    observed.add(torch.from_numpy(x_NP), torch.from_numpy(input_ND))
    return observed.packed()


def _row(name: str, slow: float, plain: list[int], by_sums: Callable[[], list[int]]) -> list[str]:
    fast, kept = _timed(by_sums)
    if kept != plain:
        raise SystemExit(f"{name}: decisions differ: {len(set(kept) ^ set(plain))} units")
    return [name, figure(slow), figure(fast), figure(slow / fast)]


def _timed(action: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def _activations(width: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(width)
    mixing = rng.normal(size=(width, width)).astype(np.float32) / np.float32(np.sqrt(width))
    spread = rng.uniform(0.2, 2.0, size=width).astype(np.float32)
    return (rng.normal(size=(tokens, width)).astype(np.float32) @ mixing) * spread + spread


def _weights(inputs: int, outputs: int) -> np.ndarray:
    return (np.random.default_rng(inputs + outputs).normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)


if __name__ == "__main__":
    main()
