"""The story of a run, from a model and text to pruned checkpoints and their record."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import actors
import slimllm_ops
from actors.group import ShardGroup
from actors.placement import Placement
from actors.pool import SolverPool
from actors.serving import shared_files, weight_server
from cluster import ClusterError, Resources, WorkerPlan, find_room, plan_workers, session
from orchestrator.config import ConfigError, PruneConfig
from orchestrator.data import DataError
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.destination import Destination, delivered, is_delivered
from orchestrator.output.staging import Staging, staged
from orchestrator.preflight.dry_run import Intent, amount, checkpoints_output, moments_output, require_room
from orchestrator.preflight.estimate import estimate_calibration, estimate_pruning
from orchestrator.progress import Reporter
from orchestrator.pruning.layerwise import prune_layerwise
from orchestrator.pruning.one_pass import calibrate as observe_model
from orchestrator.pruning.one_pass import prune_one_pass
from orchestrator.pruning.refine import refine_model
from orchestrator.pruning.run_context import Job, Target, open_targets, target_name
from orchestrator.record.files import Totals, count_totals, log_inputs, log_record, write_record
from orchestrator.record.params import run_params, settings_of, what_is_asked
from orchestrator.record.run_toml import RUN_FILE, write_run_file
from orchestrator.record.sweep import log_sweep
from orchestrator.tracking import Run, TrackingError, TrackingOptions, how_to_log, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.errors import InputError
from slimllm_ops.methods import METHODS
from slimllm_ops.stream.memory import return_large_blocks
from slimllm_ops.stream.read_back import read_back

# What whoever runs this can mend; everything else is a bug, or a machine that failed.
USER_ERRORS = (ConfigError, DataError, InputError, ClusterError, TrackingError)

Prune = Callable[[Job, list[Target]], None]
# Methods that are no row of `METHODS`.
PRUNERS: dict[str, Prune] = {"slimllm": prune_layerwise}


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """One checkpoint that a run gave, a directory or a URI, and where MLflow has it (None: nowhere)."""

    output: Path | str
    totals: Totals
    run_id: str | None
    model_uri: str | None

    @property
    def name(self) -> str:
        """The last part of its place, which tells it from the others of a sweep."""
        return str(self.output).rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What a run gave: a model for every sparsity that was asked for; none where all was finished before.

    `log_command` is what gives MLflow what it lacks of the run; None where it has everything.
    """

    output: Path | str
    models: tuple[PrunedModel, ...]
    tracking_uri: str | None
    experiment_id: str | None
    run_id: str | None
    log_command: str | None = None

    @property
    def totals(self) -> Totals:
        """The totals of the first model, the only one where one sparsity was asked for."""
        return self.models[0].totals

    @property
    def model_uri(self) -> str | None:
        """The logged model's URI of the first model."""
        return self.models[0].model_uri


def prune(config: PruneConfig, reporter: Reporter | None = None) -> PruneResult:
    """Prune a model as a config asks; the command line ends here too.

    Raises:
        ConfigError, DataError, InputError, ClusterError, TrackingError: what was asked cannot be done as asked.
        ShardError: workers were lost and not replaced.
        DeliveryError: a store did not take the output, which is whole on this machine.
        OSError: the disk is full, or something else that the machine refuses.

    Whatever ends the run, what was solved waits for the same config with `resume`; where nothing was, nothing is left.
    """
    reporter = reporter or Reporter()
    tracking = tracking_options(config)
    require_lasting(config.output, tracking)
    with reporter.timed("inputs"):
        inputs = load_inputs(config)
    tracking = named(tracking, f"{inputs.name}-{config.method}-{amount(config)}")
    output = checkpoints_output(config, inputs.name)
    if config.resume and is_delivered(output, what_is_asked(config, inputs), config.overwrite, reporter.note):
        return PruneResult(output=output.place, models=(), tracking_uri=None, experiment_id=None, run_id=None)
    with delivered(output, config.overwrite, reporter.note) as directory:
        result = _prune_into(directory, output, config, inputs, tracking, reporter)
        return replace(result, log_command=how_to_log(directory, output.place))


def _prune_into(
    directory: Path,
    output: Destination,
    config: PruneConfig,
    inputs: Inputs,
    tracking: TrackingOptions,
    reporter: Reporter,
) -> PruneResult:
    """Prune into a directory, which appears when it is whole; the result names the places where it goes."""
    with (
        staged(directory, config.overwrite, what_is_asked(config, inputs), config.resume) as staging,
        session(config.address, (actors, slimllm_ops), verbose=reporter.verbose) as resources,
        tracked_run(tracking, staging.directory / "pruning" / "metrics.jsonl", reporter.warn) as run,
    ):
        workers = settle_workers(config, resources, staging)
        require_room(Intent(config, inputs, output, resources, workers), estimate_pruning, reporter)
        run_file = staging.directory / "pruning" / RUN_FILE
        write_run_file(run_file, "prune", config, inputs, workers)
        params = run_params(config, inputs, workers)
        log_inputs(run, params, inputs)
        run.log_artifacts(run_file, to="pruning")
        link_with_job(run, reporter.warn)
        with (
            open_targets(config, staging, inputs.source, run) as targets,
            working(config, inputs, workers, find_room(resources, workers), staging, reporter) as job,
        ):
            _tell_resumed(job)
            _log_children(job, targets, run, params)
            _log_committed(job, targets)
            pruner_of(config.method)(job, targets)
            models = [
                _finish(job, target, params, output.place_of(target.directory.relative_to(staging.directory)))
                for target in targets
            ]
            if len(models) > 1:
                totals = {model.name: model.totals for model in models}
                log_sweep(run, staging.directory, config.method, totals)
        return PruneResult(
            output=output.place,
            models=tuple(models),
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
        )


def pruner_of(method: str) -> Prune:
    """Return how a method prunes: layer by layer, or as its row of `METHODS` says, a user's own among them."""
    return PRUNERS[method] if method in PRUNERS else partial(prune_one_pass, METHODS[method])


def calibrate(config: PruneConfig, reporter: Reporter | None = None) -> Path | str:
    """Pass the calibration data through a model once and keep the moments, for `prune` with `moments`.

    Returns:
        Where they are: a directory or a URI.

    Raises:
        ConfigError, DataError, InputError, ClusterError: what was asked cannot be done as asked; nothing is left.
        ShardError: workers were lost and not replaced; what was solved waits for the same config with `resume`.
        DeliveryError: a store did not take the output, which is whole on this machine.
    """
    reporter = reporter or Reporter()
    require_lasting(config.output)
    inputs = load_inputs(config)
    output, asked = moments_output(config, inputs.name), what_is_asked(config, inputs)
    if config.resume and is_delivered(output, asked, config.overwrite, reporter.note):
        reporter.note(f"{output.place} is finished: there is nothing to resume")
        return output.place
    with (
        delivered(output, config.overwrite, reporter.note) as directory,
        staged(directory, config.overwrite, asked, config.resume) as staging,
        session(config.address, (actors, slimllm_ops), verbose=reporter.verbose) as resources,
    ):
        workers = settle_workers(config, resources, staging)
        require_room(Intent(config, inputs, output, resources, workers), estimate_calibration, reporter)
        write_run_file(staging.directory / "pruning" / RUN_FILE, "calibrate", config, inputs, workers)
        with working(config, inputs, workers, find_room(resources, workers), staging, reporter) as job:
            _tell_resumed(job)
            store = MomentStore(staging.solved / "moments")
            observe_model(job, store)
            for path in store.directory.iterdir():
                path.rename(staging.directory / path.name)
    return output.place


def named(tracking: TrackingOptions, name: str) -> TrackingOptions:
    """Return where a run is logged, with a name for it if it was given none: MLflow would invent one."""
    return replace(tracking, run_name=tracking.run_name or name)


def settle_workers(config: PruneConfig, resources: Resources, staging: Staging) -> WorkerPlan:
    """Return the workers of a run; a run that is resumed has those that it began with, whatever the cluster is now.

    Raises:
        ClusterError: the cluster has less than was asked for.
    """
    planned = plan_workers(resources, config.workers, config.gpus_per_worker, config.shared_storage)
    settled = WorkerPlan(**staging.settled.once("workers", lambda: asdict(planned)))
    return replace(settled, weights_travel=planned.weights_travel)


@contextmanager
def working(
    config: PruneConfig, inputs: Inputs, workers: WorkerPlan, room: int, staging: Staging, reporter: Reporter
) -> Iterator[Job]:
    """Hold the workers of a run, as many as there is room for; they start when the first data are sent to them."""
    return_large_blocks()
    with (
        Placement(room, workers.cpus_per_worker, workers.gpus_per_worker, reporter.note) as placement,
        weight_server() if workers.weights_travel else shared_files() as deliver,
        ShardGroup(
            placement,
            deliver,
            reporter.note,
            num_shards=workers.num_workers,
            offload=config.offload,
            settle=staging.settled.once,
        ) as shards,
    ):
        pool = SolverPool(deliver(inputs.source), placement)
        yield Job(config, inputs, shards, pool, staging, reporter)


def complete(job: Job, target: Target) -> Totals:
    """Finish a target's checkpoint, refine it if asked to, read it back, measure its perplexity, count what changed."""
    pruned = target.pruned.finish()
    if target.refined is not None:
        log = target.refined.log
        if len(log) < job.source.num_layers:
            job.survive(partial(refine_model, job, target, pruned), log.__len__)
        pruned = target.refined.finish()
    with job.reporter.timed("read back"):
        probe = target.final.log.probe()
        error = read_back(pruned, probe.ids_T, probe.states_TD, job.shards.compute_dtype)
    name = str(target.directory.relative_to(job.staging.directory))
    perplexity = {
        blocks.spec: (job.dense_perplexity(blocks), job.perplexity(pruned, blocks, "perplexity, pruned", name))
        for blocks in job.inputs.held_out
    }
    return count_totals(job.inputs, pruned, perplexity, job.reporter.seconds, job.shards.peak_memory(), error)


def _finish(job: Job, target: Target, params: dict[str, object], output: Path | str) -> PrunedModel:
    """Complete a target's checkpoint, write its record and log it."""
    _tell_idle_experts(job, target)
    totals, params = complete(job, target), params | {"sparsity": target.sparsity}
    write_record(target.directory, params, job.inputs, target.final.log.plans, totals)
    name = target_name(target.sparsity, job.config)
    model_uri = log_record(target.run, target.directory, job.inputs, name, params, totals)
    return PrunedModel(output=output, totals=totals, run_id=target.run.run_id, model_uri=model_uri)


def _tell_idle_experts(job: Job, target: Target) -> None:
    """Say which experts no calibration token was sent to, so that nothing is known of their channels but weights."""
    plans = enumerate(target.final.log.plans)
    idle = [(layer, plan.mlp.idle_experts) for layer, plan in plans if plan.mlp is not None and plan.mlp.idle_experts]
    if idle:
        first = f"layer {idle[0][0]}: {', '.join(map(str, idle[0][1][:8]))}"
        job.reporter.note(
            f"no calibration token reached {sum(len(experts) for _, experts in idle)} of the experts ({first} ...): "
            f"they lost the channels of the smallest weights; calibrate on more text to know better"
        )


def _tell_resumed(job: Job) -> None:
    """Say whether what was to be resumed is there."""
    if job.config.resume:
        found = "going on from what is solved" if job.staging.resumed else "there is nothing to resume: beginning"
        job.reporter.note(f"{found} ({job.staging.directory})")


def _log_children(job: Job, targets: list[Target], run: Run, params: dict[str, object]) -> None:
    """Log in the runs of a sweep's models what they are made by: MLflow shows a run's own parameters alone."""
    for target in targets:
        if target.run is not run:
            log_inputs(target.run, settings_of(params) | {"sparsity": target.sparsity}, job.inputs)


def _log_committed(job: Job, targets: list[Target]) -> None:
    """Log the layers that were committed just before an earlier process ended, and so were not."""
    for target in targets:
        for layer, plan in enumerate(target.pruned.log.plans):
            job.log_layer(target.run, layer, plan)


def tracking_options(config: PruneConfig) -> TrackingOptions:
    """Return where a config's run is logged."""
    return TrackingOptions(
        experiment=config.experiment,
        tracking_uri=config.tracking_uri,
        run_name=config.run_name,
        register=config.register,
    )
