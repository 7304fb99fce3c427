"""What a run would be, before it is one: where it writes, what it takes, and what stands against it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import actors
import slimllm_ops
from cluster import Resources, WorkerPlan, plan_workers
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.destination import Destination, is_whole
from orchestrator.output.staging import require_startable
from orchestrator.preflight.checks import Check, check_fit, check_nodes, look_at, require_certain
from orchestrator.preflight.estimate import Estimate, Workload, estimate_calibration, estimate_pruning
from orchestrator.progress import Reporter
from orchestrator.record.files import what_is_asked

# Tells what a run takes.
Estimating = Callable[[Workload], Estimate]


@dataclass(frozen=True)
class Intent:
    """What a run is about to do, and where."""

    config: PruneConfig
    inputs: Inputs
    output: Destination
    resources: Resources
    workers: WorkerPlan


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run would be: where it writes, with which workers, what it takes, and what stands against it."""

    output: Path | str
    workers: WorkerPlan
    estimate: Estimate
    checks: tuple[Check, ...]


def plan_pruning(config: PruneConfig, reporter: Reporter | None = None) -> RunPlan | None:
    """Return what `prune` would do and take; None where it is done. Nothing is computed, written or logged.

    Raises:
        ConfigError, DataError, InputError, ClusterError: what was asked cannot be done as asked.
    """
    return _plan_run(config, reporter or Reporter(), checkpoints_output, estimate_pruning)


def plan_calibration(config: PruneConfig, reporter: Reporter | None = None) -> RunPlan | None:
    """Return what `calibrate` would do and take, as `plan_pruning` does."""
    return _plan_run(config, reporter or Reporter(), moments_output, estimate_calibration)


def checkpoints_output(config: PruneConfig, name: str) -> Destination:
    """Return where the checkpoints of a model of this name go: by default to pruned/<model>-<sparsity>."""
    return Destination.of(config.output or f"pruned/{name}-{amount(config)}")


def moments_output(config: PruneConfig, name: str) -> Destination:
    """Return where the moments of a model of this name go: by default to moments/<model>."""
    return Destination.of(config.output or f"moments/{name}")


def amount(config: PruneConfig) -> str:
    """Return how much goes, as outputs and runs are named by it."""
    if config.ratio is not None:
        return f"ratio-{config.ratio:g}"
    return "-".join(f"{sparsity:g}" for sparsity in config.targets)


def require_room(intent: Intent, estimating: Estimating, reporter: Reporter) -> None:
    """Tell what a run will take, and refuse one that will certainly fail for want of it.

    Raises:
        ConfigError: it will.
    """
    plan = _compare(intent, estimating)
    for line in plan.estimate.lines():
        reporter.note(f"estimate: {line}")
    for stage in plan.estimate.stages:
        reporter.detail(f"estimate, {stage.describe()}")
    require_certain(plan.checks, reporter.warn)


def _plan_run(
    config: PruneConfig, reporter: Reporter, place: Callable[[PruneConfig, str], Destination], estimating: Estimating
) -> RunPlan | None:
    # Every run imports this file, and one without Ray has no Ray to import.
    from cluster.session import session

    inputs = load_inputs(config)
    output, asked = place(config, inputs.name), what_is_asked(config, inputs)
    if config.resume and is_whole(output, asked):
        reporter.note(f"{output.place} is finished: there is nothing to resume")
        return None
    require_startable(output.directory, config.overwrite, asked, config.resume)
    with session(config.address, (actors, slimllm_ops), verbose=reporter.verbose) as resources:
        workers = plan_workers(resources, config.workers, config.gpus_per_worker, config.shared_storage)
        return _compare(Intent(config, inputs, output, resources, workers), estimating, gpus=workers.gpus_per_worker)


def _compare(intent: Intent, estimating: Estimating, gpus: float = 0.0) -> RunPlan:
    """Look at the nodes, and compare what they have with what the run will take.

    Args:
        intent: what the run is about to do.
        estimating: tells what it takes.
        gpus: the share of a GPU that a look at a node may take; without one GPUs are not touched, which saves the
            seconds that a process takes to begin with one.
    """
    config, workers = intent.config, intent.workers
    device = "cuda" if gpus else "" if workers.gpus_per_worker else "cpu"
    nodes = look_at(intent.resources, workers, device)
    estimate = estimating(Workload.of(config, intent.inputs, workers, nodes.rates))
    checks = (*check_nodes(nodes, workers), *check_fit(config, intent.output.directory, estimate, nodes, workers))
    return RunPlan(output=intent.output.place, workers=workers, estimate=estimate, checks=checks)
