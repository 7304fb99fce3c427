"""Plans a run before it starts: where it writes, what it takes, and what could make it fail."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import Resources, WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.destination import Destination, checkpoints_output, is_whole, moments_output
from orchestrator.output.staging import require_can_start
from orchestrator.preflight.checks import Check, check_fit, check_nodes, inspect_cluster, refuse_certain_failure
from orchestrator.preflight.commands import estimate_calibration, estimate_pruning
from orchestrator.preflight.companions import require_companions
from orchestrator.preflight.estimate import Estimate
from orchestrator.preflight.workload import Workload
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import backend_of
from orchestrator.record.params import what_is_asked

# Estimates what a run takes.
Estimating = Callable[[Workload], Estimate]


@dataclass(frozen=True)
class Intent:
    """The settings, inputs, output and workers of a run that is about to start."""

    config: PruneConfig
    inputs: Inputs
    output: Destination
    resources: Resources
    workers: WorkerPlan


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run's output, workers and estimate, with the checks of whether it can succeed."""

    output: Path | str
    workers: WorkerPlan
    estimate: Estimate
    checks: tuple[Check, ...]


def plan_pruning(config: PruneConfig, reporter: Reporter | None = None) -> RunPlan | None:
    """Return what `prune` would do and take; None if it is already done. Compute, write and log nothing.

    Raises:
        ConfigError, DataError, InputError, ClusterError: The settings cannot be met.
    """
    return _plan_run(config, reporter or Reporter(), checkpoints_output, estimate_pruning, writes_model=True)


def plan_calibration(config: PruneConfig, reporter: Reporter | None = None) -> RunPlan | None:
    """Return what `calibrate` would do and take, as `plan_pruning` does for `prune`."""
    return _plan_run(config, reporter or Reporter(), moments_output, estimate_calibration, writes_model=False)


def require_room(intent: Intent, estimating: Estimating, reporter: Reporter) -> None:
    """Report what a run will take, and refuse it if the machines certainly lack it.

    Raises:
        ConfigError: The run would certainly fail.
    """
    plan = _estimate_and_check(intent, estimating)
    reporter.note(f"estimate: {plan.estimate.describe()}")
    for stage in plan.estimate.stages:
        reporter.detail(f"estimate, {stage.describe()}")
    refuse_certain_failure(plan.checks, reporter.warn)


def _plan_run(
    config: PruneConfig,
    reporter: Reporter,
    place: Callable[[PruneConfig, str], Destination],
    estimating: Estimating,
    *,
    writes_model: bool,
) -> RunPlan | None:
    inputs = load_inputs(config, reporter.warn)
    if writes_model:
        require_companions(config.model, inputs, reporter)
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
    """Inspect the nodes, and compare what they have with what the run will take.

    Args:
        intent: The run.
        estimating: Estimates what the run takes.
        gpus: The share of a GPU that the inspection of a node may use. With 0 it does not touch GPUs, which saves the
            seconds that a process needs to start using one.
    """
    config, workers = intent.config, intent.workers
    nodes = inspect_cluster(intent.resources, gpus)
    estimate = estimating(Workload.of(config, intent.inputs, workers))
    checks = (*check_nodes(nodes, workers), *check_fit(config, intent.output.directory, estimate, nodes, workers))
    return RunPlan(output=intent.output.place, workers=workers, estimate=estimate, checks=checks)
