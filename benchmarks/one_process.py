"""Whole runs on one device by the shard's class alone: `python -m benchmarks.one_process`.

No Ray, MLflow or driver: a machine with torch, transformers and accelerate will do. A random checkpoint of a 7B model's
shape by default, 128 x 2048 tokens, `slimllm` at 20 % and `gram` at 20, 30 and 50 %, on a GPU where there is one.
Beside each stage's seconds stands the share that its products alone would take at the rate of a plain product here.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch

from actors.batching import into_batches
from actors.shard import Shard
from benchmarks.machine import describe_machine, write_table
from benchmarks.random_model import Shape, write_model
from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.layer_ratios import (
    budget_by_sparsity,
    measure_layer,
    parameters_to_remove,
    published_settings,
)
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.paths import LayerPaths
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.methods import METHODS
from slimllm_ops.models.families import Branch, layer_shape
from slimllm_ops.module_solves import candidates_of, decide_module, eliminate_module
from slimllm_ops.moments.moments import accumulation_dtype
from slimllm_ops.moments.observation import PackedObservation
from slimllm_ops.stream.memory import return_large_blocks
from slimllm_ops.stream.operations import LayerOperations, elimination_operations, rate_of_products
from slimllm_ops.stream.weights import compute_dtype

BLOCK = 2048
GRAM = METHODS["gram"]


@dataclass
class Stages:
    """Seconds of each stage, and the operations that its products take, by the dtype that they are made in."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    operations: dict[str, tuple[torch.dtype, float]] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to a stage."""
        start = self._now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - start

    def count(self, stage: str, dtype: torch.dtype, operations: float) -> None:
        """Note what a stage's products take in all."""
        self.operations[stage] = (dtype, operations)

    def rows(self, run: str, rates: dict[torch.dtype, float]) -> list[list[str]]:
        """Return a line of the table for every stage."""
        rows = []
        for stage, seconds in self.seconds.items():
            dtype, operations = self.operations.get(stage, (torch.float32, 0.0))
            share = f"{operations / rates[dtype] / seconds:.0%}" if operations else ""
            rows.append([f"{run}: {stage}", f"{seconds:.1f}", share])
        return [*rows, [f"{run}: in all", f"{sum(self.seconds.values()):.1f}", ""]]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Run:
    """What both methods work on."""

    source: Checkpoint
    batches: list[np.ndarray]
    device: torch.device
    output: Path

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return sum(batch.size for batch in self.batches)

    def shard(self) -> Shard:
        """Return a shard that holds all tokens, in a stream "a"."""
        shard = Shard(self.device.type, torch.get_num_threads())
        shard.open_stream("a", self.source, self.batches)
        return shard

    def weight(self, layer: int, branch: Branch) -> torch.Tensor:
        """Return a branch's output projection (D, P) on the device."""
        name = self.source.layer_prefix(layer) + branch.output_weight
        return self.source.read([name])[name].to(self.device, torch.float32)


@click.command()
@click.option("--hidden", default=4096)
@click.option("--intermediate", default=11008)
@click.option("--layers", default=32)
@click.option("--heads", default=32)
@click.option("--kv-heads", default=32)
@click.option("--blocks", default=128, help="Blocks of 2048 tokens.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--model", type=Path, help="A checkpoint in the place of a random one.")
@click.option("--output", type=Path, default=Path("benchmarks/results/one_process.md"))
def main(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    blocks: int,
    device: str,
    model: Path | None,
    output: Path,
) -> None:
    """Run both methods once and write the table."""
    return_large_blocks()
    shape = Shape(hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, kv_heads=kv_heads)
    with tempfile.TemporaryDirectory() as folder:
        source = Checkpoint.open(model or write_model(Path(folder) / "model", shape, device))
        ids = np.random.default_rng(0).integers(0, source.config.vocab_size, size=(blocks, BLOCK)).astype(np.int32)
        rates = rates_of(torch.device(device))
        rows = [["stage", "seconds", "of the rate of a plain product"]]
        for name, method in (("slimllm, 20 %", prune_slimllm), ("gram, 20, 30 and 50 %", prune_gram)):
            run = Run(source, into_batches(ids), torch.device(device), Path(folder) / method.__name__)
            rows += method(run).rows(name, rates)
            rows.append([f"{name}: peak memory, GB", _peak(run.device), ""])
    plain = ", ".join(f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.2f}" for dtype, rate in rates.items())
    size = f"hidden {hidden}, {layers} layers, intermediate {intermediate}, {heads} heads, {kv_heads} KV heads"
    title = f"One process on {device}: {model or size}, {blocks} x {BLOCK} tokens"
    write_table(output, title, f"{describe_machine()}; plain products at {plain} TFLOP/s", rows)


def prune_slimllm(run: Run) -> Stages:
    """Measure similarities, then observe, decide, apply and write layer by layer."""
    source, stages = run.source, Stages(run.device)
    num_layers, family = source.num_layers, source.family
    with stages.timed("embedding"):
        shard = run.shard()
    with stages.timed("similarities"):
        similarities = [shard.forward("a", layer).value for layer in range(num_layers)]
    shard.close_stream("a")
    sizes = [measure_layer(source, layer) for layer in range(num_layers)]
    num_pruned, alpha = published_settings(0.2, num_layers)
    budget = budget_by_sparsity(sizes, similarities, sparsity=0.2, num_pruned=num_pruned, alpha=alpha)
    writer, plans = CheckpointWriter(source, run.output), list[LayerPlan]()
    with stages.timed("embedding"):
        shard = run.shard()
    for layer in range(num_layers):
        share = budget.layers[layer]
        with stages.timed("observing"):
            observed = shard.observe("a", layer, family.attention)
        with stages.timed("deciding heads"):
            counts = {"num_removed": share.units}
            heads = shard.decide_heads("a", layer, observed, **counts) if share.units else None
        with stages.timed("applying"):
            shard.apply("a", layer, family.attention, heads)
        with stages.timed("observing"):
            observed = shard.observe("a", layer, family.mlp)
        with stages.timed("deciding channels"):
            counts = {"num_removed": share.channels, "keep_lowest": 0.01}
            channels = shard.decide_channels("a", layer, observed, **counts) if share.channels else None
        with stages.timed("applying"):
            shard.apply("a", layer, family.mlp, channels)
        with stages.timed("writing"):
            plans.append(LayerPlan(heads, channels))
            writer.write_layer(layer, plans[layer])
    with stages.timed("writing"):
        writer.finish(plans)
    dtype = compute_dtype(run.device)
    layer, output = LayerOperations.of(source, 0, BLOCK), _output_operations(source)
    stages.count("similarities", dtype, run.tokens * num_layers * layer.forward)
    stages.count("observing", dtype, run.tokens * num_layers * (layer.forward - output + layer.moments))
    stages.count("applying", dtype, run.tokens * num_layers * output * 0.8)
    return stages


def prune_gram(run: Run) -> Stages:
    """Observe every layer and eliminate, then spend the budgets, decide and write."""
    source, stages = run.source, Stages(run.device)
    run.output.mkdir()
    store = MomentStore(run.output)
    with stages.timed("embedding"):
        shard = run.shard()
    for layer in range(source.num_layers):
        shape = layer_shape(source.config, layer)
        seen, paths, powers = [], [], ()
        for branch, num_units in zip(
            _branches(source), (shape.num_attention_units, shape.intermediate_size), strict=True
        ):
            with stages.timed("observing"):
                observed, powers = shard.observe_dense("a", layer, branch)
            with stages.timed("eliminating"):
                paths.append(eliminate_module(run.weight(layer, branch), observed, num_units))
            seen.append(observed)
        with stages.timed("storing moments"):
            store.save(layer, LayerPaths(*paths, shard.mean_powers(powers)[0]), *seen)
    shard.close_stream("a")
    _write_models(run, store, stages, (0.2, 0.3, 0.5))
    one = LayerOperations.of(source, 0, BLOCK)
    stages.count("observing", compute_dtype(run.device), run.tokens * source.num_layers * (one.forward + one.moments))
    channels = elimination_operations(source.config.intermediate_size, source.config.hidden_size)
    stages.count("eliminating", accumulation_dtype(run.device), source.num_layers * channels)
    return stages


def _write_models(run: Run, store: MomentStore, stages: Stages, sparsities: tuple[float, ...]) -> None:
    """Spend every sparsity's budget over all modules, and write the models layer by layer."""
    source = run.source
    sizes = [measure_layer(source, layer) for layer in range(source.num_layers)]
    paths = [store.load_paths(layer) for layer in range(source.num_layers)]
    rankings = [(path.attention.ranking, path.mlp.ranking) for path in paths]
    candidates = candidates_of(sizes, paths, rankings)
    with stages.timed("spending"):
        spent = [GRAM.spend(candidates, parameters_to_remove(sizes, sparsity)) for sparsity in sparsities]
    writers = [CheckpointWriter(source, run.output / f"{sparsity:g}") for sparsity in sparsities]
    plans: list[list[LayerPlan]] = [[] for _ in sparsities]
    for layer in range(source.num_layers):
        decided = []
        for number, (module, branch) in enumerate(zip(("attention", "mlp"), _branches(source), strict=True)):
            with stages.timed("refitting"):
                observed = store.load_moments(layer, module)
                index = 2 * layer + number
                removals = [counts[index] for counts in spent]
                decided.append(_decide(run, layer, branch, observed, candidates[index], removals))
        with stages.timed("writing"):
            for writer, written, attention, mlp in zip(writers, plans, *decided, strict=True):
                plan = LayerPlan(attention, mlp)
                writer.write_layer(layer, plan)
                written.append(plan.recorded())
    with stages.timed("writing"):
        for writer, written in zip(writers, plans, strict=True):
            writer.finish(written)


def _decide(
    run: Run, layer: int, branch: Branch, observed: PackedObservation, candidate: Candidate, removals: list[int]
) -> list[Decision | None]:
    return decide_module(run.weight(layer, branch), observed, GRAM, candidate.ranking, removals)


def _branches(source: Checkpoint) -> tuple[Branch, Branch]:
    return source.family.attention, source.family.mlp


def _output_operations(source: Checkpoint) -> float:
    """Return the operations per token of a layer's output projections."""
    names = [source.layer_prefix(0) + branch.output_weight for branch in _branches(source)]
    return 2 * source.num_parameters(names)


def rates_of(device: torch.device) -> dict[torch.dtype, float]:
    """Return the operations per second of plain products in the dtypes of layers and of sums."""
    size = 8192 if device.type == "cuda" else 2048
    dtypes = compute_dtype(device), accumulation_dtype(device)
    return {dtype: rate_of_products(device, dtype, size, 5) for dtype in dtypes}


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return "on a CPU: see memory.md"
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return f"{peak / 1e9:.1f}"


if __name__ == "__main__":
    main()
