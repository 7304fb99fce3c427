"""Estimates of memory and disk space match what a run uses, and cover only the stages that were asked for."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.random_model import Shape, write_model
from benchmarks.sampling import private_memory
from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.pipeline import PruneResult
from orchestrator.preflight.commands import estimate_calibration, estimate_comparison, estimate_pruning
from orchestrator.preflight.dry_run import plan_pruning
from orchestrator.preflight.estimate import Estimate
from orchestrator.preflight.stages import LIBRARIES, SOLVE_LIBRARIES
from orchestrator.preflight.workload import Text, Workload
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.moments import MomentSum
from slimllm_ops.moments.outputs import OutputPairs, OutputSum
from slimllm_ops.stream.footprint import layerwise_bytes, moment_bytes
from tests.conftest import shard_processes

SHAPE = Shape(hidden=512, intermediate=1024, layers=3, heads=8, kv_heads=4, vocabulary=500)
BLOCKS, LENGTH = 64, 256
WITHIN = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("large") / "model", SHAPE)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = np.random.default_rng(0).integers(0, SHAPE.vocabulary, size=(BLOCKS, LENGTH))
    path = tmp_path_factory.mktemp("tokens") / "tokens.parquet"
    pq.write_table(pa.table({"input_ids": ids.tolist()}), path)
    return path


def running() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)


def titled(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


@contextmanager
def sampled() -> Iterator[dict[str, int]]:
    """Samples the private memory of this process's workers and solves; the largest of each, by what they are."""
    peaks = {"worker": 0, "solve": 0}
    # Workers of another run may be about to end. A solve's process may be one that stayed.
    others = {process.pid for process in shard_processes()}
    stop = threading.Event()

    def sample() -> None:
        listed, at = running(), time.monotonic()
        while not stop.wait(0.02):
            # Listing reads every process of the machine.
            if time.monotonic() > at + 0.2:
                listed, at = running(), time.monotonic()
            for process in listed:
                try:
                    title = titled(process)
                    role = "worker" if title.startswith("ray::Shard") else "solve"
                    if process.pid not in others and title.startswith(("ray::Shard", "ray::eliminate", "ray::decide")):
                        peaks[role] = max(peaks[role], private_memory(process))
                except psutil.Error:
                    continue

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def baseline(prune_on_ray: Callable[..., PruneResult], mha_model: Path) -> int:
    """What a worker takes on a model of next to nothing: its libraries."""
    with sampled() as peaks:
        prune_on_ray(mha_model)
    return peaks["worker"]


# The other method has no solves. What its workers hold is measured in tests/actors/test_memory.py.
@pytest.mark.parametrize("method", ["gram", pytest.param("slimllm", marks=pytest.mark.slow)])
def test_the_estimate_is_what_a_run_takes(
    prune_on_ray: Callable[..., PruneResult],
    model: Path,
    tokens: Path,
    tracking_uri: str,
    baseline: int,
    method: str,
) -> None:
    settings: dict[str, Any] = {"calibration": str(tokens), "method": method, "sparsity": (0.33,), "workers": 1}
    plan = plan_pruning(PruneConfig(model=str(model), tracking_uri=tracking_uri, **settings))
    assert plan is not None
    estimate = plan.estimate
    with sampled() as peaks:
        result = prune_on_ray(model, **settings)
    assert estimate.worker == pytest.approx(peaks["worker"], rel=WITHIN)
    # The libraries are more than half of it: what is above them is told as well.
    assert estimate.worker - LIBRARIES == pytest.approx(peaks["worker"] - baseline, rel=WITHIN)
    if method == "gram":
        # Both are forks here, and so a solve has a worker's libraries. tests/benchmarks/test_memory.py runs whole ones.
        above = peaks["solve"] - baseline
        assert estimate.solve == pytest.approx(SOLVE_LIBRARIES + above, rel=WITHIN)
    written = sum(path.stat().st_size for path in result.output.rglob("*") if path.is_file())
    assert estimate.output == pytest.approx(written, rel=WITHIN)
    # Stages are those of the run, by its own names.
    assert [stage.name for stage in estimate.stages[1:]] == list(result.totals.seconds)[1:]


# ---- Told from shapes alone


@pytest.fixture(scope="module")
def source(model: Path) -> Checkpoint:
    return Checkpoint.open(model)


def told(
    source: Checkpoint, estimating: Callable[[Workload], Estimate] = estimate_pruning, workers: int = 1, **settings: Any
) -> Estimate:
    work = Workload(
        config=PruneConfig(**settings),
        source=source,
        calibration=Text(BLOCKS, LENGTH),
        held_out=(Text(4, LENGTH),) if settings.get("evaluate") else (),
        workers=WorkerPlan(workers, 2, 0.0, weights_travel=workers > 1),
        driver=500_000_000,
    )
    return estimating(work)


def test_states_are_shared_by_workers_and_go_to_files(source: Checkpoint) -> None:
    one, two, spilled = told(source), told(source, workers=2), told(source, offload=True)
    # The residual stream, and X with the output of an MLP, which wait for its channels.
    states = BLOCKS * LENGTH * 4 * (2 * SHAPE.hidden + SHAPE.intermediate)
    assert one.worker - two.worker == states // 2
    assert one.worker - spilled.worker == spilled.spilled == states
    assert (one.spilled, one.weights, one.moments) == (0, 0, 0)
    # Similarities, then pruning: each node but the driver's is sent the model twice.
    assert two.weights == 2 * source.num_bytes()
    assert two.moments > 0


def test_what_is_asked_for_decides_the_stages(source: Checkpoint) -> None:
    gram = told(source, method="gram", sparsity=(0.2, 0.5), refine=True, evaluate=("x",))
    assert [stage.name for stage in gram.stages] == [
        *(
            "start",
            "sensitivities",
            "calibrating",
            "deciding",
            "refining",
            "read back",
            "perplexity, dense",
            "perplexity, pruned",
        )
    ]
    kept = told(source, method="gram", moments="kept")
    assert [stage.name for stage in kept.stages] == ["start", "deciding", "read back"]
    # No worker starts, and no moments are kept.
    assert (kept.worker, kept.beside, kept.tokens) == (0, 0, 0)
    calibration = told(source, estimate_calibration, method="gram")
    assert [stage.name for stage in calibration.stages] == ["start", "sensitivities", "calibrating"]
    moments = told(source, method="gram").beside
    assert (calibration.output, calibration.tracked) == (moments, 0)
    assert (gram.tracked, told(source, tracking_uri="none").tracked) == (gram.output, 0)
    # Both checkpoints once more, as they were before they were refined.
    assert gram.beside == moments + gram.output


@pytest.mark.parametrize("kept", [False, True])
def test_a_comparison_takes_what_the_largest_of_its_methods_does(source: Checkpoint, kept: bool) -> None:
    settings: dict[str, Any] = {"sparsity": (0.2, 0.5), "evaluate": ("x",)}
    estimating = partial(estimate_comparison, one_pass=2, refined=1, kept=kept)
    both = told(source, estimating, **settings)
    paper, refined = told(source, **settings), told(source, method="gram", refine=True, **settings)
    assert [stage.name for stage in both.stages] == [
        *("start", "sensitivities", "calibrating", "layer similarities", "pruning", "deciding", "refining"),
        *("read back", "perplexity, dense", "perplexity, pruned"),
    ]
    assert both.worker == max(paper.worker, refined.worker)
    assert both.solve == refined.solve
    # Three methods write both models. One refines, and has both once more; unless all are kept, they go one by one.
    moments = told(source, method="gram").beside
    assert both.output == (3 * paper.output if kept else 0)
    assert both.beside == moments + (1 if kept else 2) * paper.output


def test_moments_are_as_large_as_told(source: Checkpoint) -> None:
    widths, whole = (SHAPE.hidden, SHAPE.intermediate), 0
    for width in widths:
        total = MomentSum()
        total.add(torch.ones(2, width))
        whole += total.packed().num_bytes
    assert moment_bytes(source, torch.device("cpu")) == pytest.approx(whole, rel=0.01)


def test_the_sums_of_the_published_method_are_as_large_as_told(source: Checkpoint) -> None:
    moments, outputs = MomentSum(), OutputSum(intercept=True)
    moments.add(torch.ones(2, SHAPE.hidden))
    x, states = torch.ones(2, SHAPE.intermediate), torch.ones(2, SHAPE.hidden)
    outputs.add(x, states, states)
    pairs = OutputPairs.of(states, states)
    whole = moments.packed().num_bytes + outputs.packed().num_bytes + pairs.sums_5D.nbytes
    assert layerwise_bytes(source, torch.device("cpu")) == pytest.approx(whole, rel=0.01)
    assert told(source, workers=2).moments == layerwise_bytes(source, torch.device("cpu")) * SHAPE.layers
