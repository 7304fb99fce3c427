"""Runs pruning from start to end: from a model and text to pruned checkpoints and their record."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster import ClusterError
from orchestrator.config import ConfigError, PruneConfig
from orchestrator.data import DataError
from orchestrator.evaluation.asking import Ask, prepare_tasks, require_shared_files, tasks_of_run
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.destination import (
    Destination,
    checkpoints_output,
    deliver_output,
    finish_delivery,
    moments_output,
    sparsity_label,
)
from orchestrator.output.staging import open_staging
from orchestrator.preflight.commands import estimate_calibration, estimate_pruning
from orchestrator.preflight.companions import require_companions
from orchestrator.preflight.dry_run import Intent, require_room
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import Backend, backend_of
from orchestrator.pruning.calibrate import calibrate as observe_model
from orchestrator.pruning.finish import complete
from orchestrator.pruning.generate import complete_calibration, keep_generated
from orchestrator.pruning.layerwise import prune_layerwise
from orchestrator.pruning.one_pass import prune_one_pass
from orchestrator.pruning.run_context import RunContext, open_context, open_session, settle_workers, tell_resumed
from orchestrator.pruning.targets import Target, open_targets, target_name
from orchestrator.record.files import write_record
from orchestrator.record.mlflow import log_inputs, log_record
from orchestrator.record.params import run_params, settings_of, what_is_asked
from orchestrator.record.run_toml import RUN_FILE, write_run_file
from orchestrator.record.sweep import log_sweep
from orchestrator.record.totals import Totals
from orchestrator.tracking import Run, TrackingError, TrackingOptions, how_to_log, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting_output
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.errors import InputError
from slimllm_ops.methods import METHODS

# Errors that the user can fix; any other is a bug, or a machine that failed.
USER_ERRORS = (ConfigError, DataError, InputError, ClusterError, TrackingError)

Prune = Callable[[RunContext, list[Target]], None]
# Methods that are not rows of `METHODS`.
PRUNERS: dict[str, Prune] = {"slimllm": prune_layerwise}


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """A checkpoint that a run wrote, at a directory or a URI, and its ids in MLflow (None if it is not there)."""

    output: Path | str
    totals: Totals
    run_id: str | None
    model_uri: str | None

    @property
    def name(self) -> str:
        """The last part of the output's path, which tells the models of a sweep apart."""
        return str(self.output).rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """The result of a run: a model for every sparsity, or none if the run was finished before.

    `log_command` is the command that logs what MLflow lacks of the run; None if it has everything.
    """

    output: Path | str
    models: tuple[PrunedModel, ...]
    tracking_uri: str | None
    experiment_id: str | None
    run_id: str | None
    log_command: str | None = None

    @property
    def totals(self) -> Totals:
        """The totals of the first model, which is the only one for a single sparsity."""
        return self.models[0].totals

    @property
    def model_uri(self) -> str | None:
        """The first model's URI in MLflow."""
        return self.models[0].model_uri


def prune(config: PruneConfig, reporter: Reporter | None = None) -> PruneResult:
    """Prune a model; `slimllm prune` calls this too.

    If the run ends early, its results so far stay, and the same config with `resume` continues from them. If there are
    none, nothing is left.

    Raises:
        ConfigError, DataError, InputError, ClusterError, TrackingError: The settings cannot be met.
        ShardError: Workers were lost and not replaced.
        DeliveryError: A store did not take the output, which is complete on this machine.
        OSError: The disk is full, or the machine refuses something else.

    Example:
        result = prune(PruneConfig(model="path/to/model", method="gram", sparsity=(0.2,)))
        print(result.output, result.totals.perplexity)
    """
    reporter = reporter or Reporter()
    tracking = tracking_options(config)
    require_lasting_output(config.output, tracking)
    backend = backend_of(config)
    backend.require_place()
    with reporter.timed("inputs"):
        ask = prepare_tasks(tasks_of_run(config))
        inputs = load_inputs(config, reporter.warn)
        require_companions(config.model, inputs, reporter)
    tracking = named(tracking, f"{inputs.name}-{config.method}-{sparsity_label(config)}")
    output = checkpoints_output(config, inputs.name)
    if config.resume and finish_delivery(output, what_is_asked(config, inputs), config.overwrite, reporter.note):
        return PruneResult(output=output.place, models=(), tracking_uri=None, experiment_id=None, run_id=None)
    with deliver_output(output, config.overwrite, reporter.note) as directory:
        result = _prune_into(directory, output, config, inputs, ask, tracking, backend, reporter)
        return replace(result, log_command=how_to_log(directory, output.place))


def _prune_into(
    directory: Path,
    output: Destination,
    config: PruneConfig,
    inputs: Inputs,
    ask: Ask | None,
    tracking: TrackingOptions,
    backend: Backend,
    reporter: Reporter,
) -> PruneResult:
    """Prune into a directory, which appears once it is complete; the result has the final places."""
    with (
        open_staging(directory, config.overwrite, what_is_asked(config, inputs), config.resume) as staging,
        open_session(backend, staging, reporter) as resources,
        tracked_run(tracking, staging.directory / "pruning" / "metrics.jsonl", reporter.warn) as run,
    ):
        workers = settle_workers(backend, resources, staging)
        if ask:
            require_shared_files(workers)
        require_room(Intent(config, inputs, output, resources, workers), estimate_pruning, reporter)
        with (
            open_context(backend, resources, workers, config, inputs, staging, reporter) as context,
            open_targets(config, staging, inputs.source, run) as targets,
        ):
            tell_resumed(config.resume, staging, reporter)
            context = complete_calibration(replace(context, ask=ask))
            run_file = staging.directory / "pruning" / RUN_FILE
            write_run_file(run_file, "prune", config, context.inputs, workers)
            params = run_params(config, context.inputs, workers)
            log_inputs(run, params, context.inputs)
            run.log_artifacts(run_file, to="pruning")
            link_with_job(run, reporter.warn)
            models = _prune_targets(context, targets, run, params, output)
        return PruneResult(
            output=output.place,
            models=tuple(models),
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
        )


def _prune_targets(
    context: RunContext, targets: list[Target], run: Run, params: dict[str, object], output: Destination
) -> list[PrunedModel]:
    """Prune, finish and log every target, and a summary of several."""
    if not context.inputs.held_out:
        context.reporter.note("no perplexity is measured: to measure it, pass held-out text with --evaluate")
    _log_children(context, targets, run, params)
    _log_committed(context, targets)
    # A model that does not fit the workers ends the run here, before the pruning.
    context.dense_answers()
    pruner_of(context.config.method)(context, targets)
    staged = context.staging.directory
    models = [
        _finish(context, target, params, output.place_of(target.directory.relative_to(staged))) for target in targets
    ]
    if len(models) > 1:
        log_sweep(run, staged, context.config.method, {model.name: model.totals for model in models})
    return models


def pruner_of(method: str) -> Prune:
    """Return a method's pruning function: layer by layer, or by its row of `METHODS`, which may be a user's own."""
    return PRUNERS[method] if method in PRUNERS else partial(prune_one_pass, METHODS[method])


def calibrate(config: PruneConfig, reporter: Reporter | None = None) -> Path | str:
    """Pass the calibration data through a model once and save the moments, for `prune` with `moments`.

    Returns:
        The directory or URI of the moments.

    Raises:
        ConfigError, DataError, InputError, ClusterError: The settings cannot be met; nothing is left.
        ShardError: Workers were lost and not replaced; results so far stay, and `resume` continues from them.
        DeliveryError: A store did not take the output, which is complete on this machine.

    Example:
        moments = calibrate(PruneConfig(model="path/to/model", method="gram"))
        prune(PruneConfig(model="path/to/model", method="gram", moments=str(moments)))
    """
    reporter = reporter or Reporter()
    require_lasting_output(config.output)
    backend = backend_of(config)
    backend.require_place()
    inputs = load_inputs(config, reporter.warn)
    output, asked = moments_output(config, inputs.name), what_is_asked(config, inputs)
    if config.resume and finish_delivery(output, asked, config.overwrite, reporter.note):
        reporter.note(f"{output.place} is finished: there is nothing to resume")
        return output.place
    with (
        deliver_output(output, config.overwrite, reporter.note) as directory,
        open_staging(directory, config.overwrite, asked, config.resume) as staging,
        open_session(backend, staging, reporter) as resources,
    ):
        workers = settle_workers(backend, resources, staging)
        require_room(Intent(config, inputs, output, resources, workers), estimate_calibration, reporter)
        with open_context(backend, resources, workers, config, inputs, staging, reporter) as context:
            tell_resumed(config.resume, staging, reporter)
            context = complete_calibration(context)
            write_run_file(staging.directory / "pruning" / RUN_FILE, "calibrate", config, context.inputs, workers)
            store = MomentStore(staging.solved / "moments")
            observe_model(context, store)
            keep_generated(context.inputs.calibration, store.directory)
            for path in store.directory.iterdir():
                path.rename(staging.directory / path.name)
    return output.place


def named(tracking: TrackingOptions, name: str) -> TrackingOptions:
    """Return the options with this run name, unless they have one; without any, MLflow would invent one."""
    return replace(tracking, run_name=tracking.run_name or name)


def _finish(context: RunContext, target: Target, params: dict[str, object], output: Path | str) -> PrunedModel:
    """Complete a target's checkpoint, write its record and log it."""
    _tell_idle_experts(context, target)
    totals, params = complete(context, target), params | {"sparsity": target.sparsity}
    write_record(target.directory, params, context.inputs, target.final.log.plans, totals)
    name = target_name(target.sparsity, context.config)
    model_uri = log_record(target.run, target.directory, context.inputs, name, params, totals)
    return PrunedModel(output=output, totals=totals, run_id=target.run.run_id, model_uri=model_uri)


def _tell_idle_experts(context: RunContext, target: Target) -> None:
    """Report experts that no calibration token reached, so that only the weights of their channels are known."""
    plans = enumerate(target.final.log.plans)
    idle = [(layer, plan.mlp.idle_experts) for layer, plan in plans if plan.mlp is not None and plan.mlp.idle_experts]
    if idle:
        first = f"layer {idle[0][0]}: {', '.join(map(str, idle[0][1][:8]))}"
        context.reporter.note(
            f"no calibration token reached {sum(len(experts) for _, experts in idle)} of the experts ({first} ...): "
            f"they lost the channels with the smallest weights; calibrate on more text to reach them"
        )


def _log_children(context: RunContext, targets: list[Target], run: Run, params: dict[str, object]) -> None:
    """Log the parameters and data in every run of a sweep: MLflow shows only a run's own parameters."""
    for target in targets:
        if target.run is not run:
            log_inputs(target.run, settings_of(params) | {"sparsity": target.sparsity}, context.inputs)


def _log_committed(context: RunContext, targets: list[Target]) -> None:
    """Log the layers that an earlier process committed but did not log before it ended."""
    for target in targets:
        for layer, plan in enumerate(target.pruned.log.plans):
            context.log_layer(target.run, layer, plan)


def tracking_options(config: PruneConfig) -> TrackingOptions:
    """Return the tracking options of a config."""
    return TrackingOptions(
        experiment=config.experiment,
        tracking_uri=config.tracking_uri,
        run_name=config.run_name,
        register=config.register,
    )
