"""What a run would be, before it is one: where it writes, what it takes, and what stands against it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import Resources, WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.destination import Destination, checkpoints_output, is_whole, moments_output
from orchestrator.output.staging import require_can_start
from orchestrator.preflight.checks import Check, check_fit, check_nodes, inspect_cluster, refuse_certain_failure
from orchestrator.preflight.estimate import Estimate
from orchestrator.preflight.stages import estimate_calibration, estimate_pruning
from orchestrator.preflight.workload import Workload
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import backend_of
from orchestrator.record.params import what_is_asked

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


def require_room(intent: Intent, estimating: Estimating, reporter: Reporter) -> None:
    """Tell what a run will take, and refuse one that will certainly fail for want of it.

    Raises:
        ConfigError: it will.
    """
    plan = _estimate_and_check(intent, estimating)
    for line in plan.estimate.lines():
        reporter.note(f"estimate: {line}")
    for stage in plan.estimate.stages:
        reporter.detail(f"estimate, {stage.describe()}")
    refuse_certain_failure(plan.checks, reporter.warn)


def _plan_run(
    config: PruneConfig, reporter: Reporter, place: Callable[[PruneConfig, str], Destination], estimating: Estimating
) -> RunPlan | None:
    # Every run imports this file, and one without Ray has no Ray to import.

    inputs = load_inputs(config)
    output, asked = place(config, inputs.name), what_is_asked(config, inputs)
    if config.resume and is_whole(output, asked):
        reporter.note(f"{output.place} is finished: there is nothing to resume")
        return None
    require_can_start(output.directory, config.overwrite, asked, config.resume)
    backend = backend_of(config)
    with backend.session(verbose=reporter.verbose) as resources:
        workers = backend.plan_workers(resources)
        return _estimate_and_check(
            Intent(config, inputs, output, resources, workers), estimating, gpus=workers.gpus_per_worker
        )


def _estimate_and_check(intent: Intent, estimating: Estimating, gpus: float = 0.0) -> RunPlan:
    """Look at the nodes, and compare what they have with what the run will take.

    Args:
        intent: what the run is about to do.
        estimating: tells what it takes.
        gpus: the share of a GPU that a look at a node may take; without one GPUs are not touched, which saves the
            seconds that a process takes to begin with one.
    """
    config, workers = intent.config, intent.workers
    device = "cuda" if gpus else "" if workers.gpus_per_worker else "cpu"
    nodes = inspect_cluster(intent.resources, workers, device)
    estimate = estimating(Workload.of(config, intent.inputs, workers, nodes.rates))
    checks = (*check_nodes(nodes, workers), *check_fit(config, intent.output.directory, estimate, nodes, workers))
    return RunPlan(output=intent.output.place, workers=workers, estimate=estimate, checks=checks)
