"""Tunes a pruned checkpoint from start to end: from a checkpoint and text to a better checkpoint and its record."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import WorkerPlan
from orchestrator.config import ConfigError
from orchestrator.output.destination import Destination, deliver_output, finish_delivery
from orchestrator.output.staging import open_staging
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import Backend, backend_of
from orchestrator.pruning.run_context import open_session, settle_workers, tell_resumed
from orchestrator.record.run_toml import RUN_FILE
from orchestrator.tracking import TrackingOptions, how_to_log, stored_parent, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting_output
from orchestrator.tuning.config import BLOCKS, TuneConfig
from orchestrator.tuning.context import TuneContext
from orchestrator.tuning.estimate import require_room_to_train
from orchestrator.tuning.inputs import TuneInputs, load_tune_inputs
from orchestrator.tuning.params import tune_params, what_is_asked
from orchestrator.tuning.record import log_inputs, log_record, write_record, write_run_file
from orchestrator.tuning.result import TuneTotals
from orchestrator.tuning.training import shared_batch
from orchestrator.tuning.ways import tune_by_blocks, tune_whole
from slimllm_ops.checkpoint import tokenizer

# Methods that do not train the model as a whole.
WAYS: dict[str, Callable[[TuneContext], TuneTotals]] = {BLOCKS: tune_by_blocks}


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """The result of a training; `totals` is None if it was finished before.

    `log_command` is the command that logs what MLflow lacks of the run; None if it has everything.
    """

    output: Path | str
    totals: TuneTotals | None
    tracking_uri: str | None = None
    experiment_id: str | None = None
    run_id: str | None = None
    model_uri: str | None = None
    log_command: str | None = None


def tune(config: TuneConfig, reporter: Reporter | None = None) -> TuneResult:
    """Tune a checkpoint; `slimllm tune` calls this too.

    If the run ends early, its checkpoints so far stay, and the same config with `resume` continues from the latest.

    Raises:
        ConfigError, DataError, InputError, ClusterError, TrackingError: The settings cannot be met.
        ShardError: Workers were lost too often.
        DeliveryError: A store did not take the output, which is complete on this machine.
        OSError: The disk is full, or the machine refuses something else.

    Example:
        result = tune(TuneConfig(checkpoint="pruned/model-0.2", steps=200))
        print(result.output, result.totals.recovered)
    """
    reporter = reporter or Reporter()
    require_lasting_output(config.output, tracking_options(config, None))
    backend = backend_of(config)
    backend.require_place()
    with reporter.timed("inputs"):
        inputs = load_tune_inputs(config, reporter.warn)
    output, asked = tuned_output(config, inputs), what_is_asked(config, inputs)
    if config.resume and finish_delivery(output, asked, config.overwrite, reporter.note):
        return TuneResult(output=output.place, totals=None)
    with deliver_output(output, config.overwrite, reporter.note) as directory:
        result = _tune_into(directory, output, config, inputs, backend, reporter)
        return replace(result, log_command=how_to_log(directory, output.place))


def _tune_into(
    directory: Path, output: Destination, config: TuneConfig, inputs: TuneInputs, backend: Backend, reporter: Reporter
) -> TuneResult:
    """Tune into a directory, which appears once it is complete; the result has the final places."""
    tracking = tracking_options(config, inputs)
    with (
        open_staging(directory, config.overwrite, what_is_asked(config, inputs), config.resume) as staging,
        open_session(backend, staging, reporter) as resources,
        tracked_run(tracking, staging.directory / "pruning" / "metrics.jsonl", reporter.warn) as run,
    ):
        workers = settle_workers(backend, resources, staging)
        require_sharing(config, workers)
        require_room_to_train(config, inputs, output.directory, resources, workers, reporter)
        tell_resumed(config.resume, staging, reporter)
        context = TuneContext(config, inputs, backend, resources, workers, staging, run, reporter)
        params = tune_params(config, inputs, workers)
        write_run_file(staging.directory / "pruning" / RUN_FILE, config, inputs, workers)
        log_inputs(run, params, inputs)
        link_with_job(run, reporter.warn)
        totals = WAYS.get(config.method, tune_whole)(context)
        tokenizer.require_same(inputs.checkpoint.directory, staging.directory)
        write_record(staging.directory, params, inputs, totals)
        return TuneResult(
            output=output.place,
            totals=totals,
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
            model_uri=log_record(run, staging.directory, inputs, params, totals),
        )


def require_sharing(config: TuneConfig, workers: WorkerPlan) -> None:
    """Check that the workers can share a step, and that they see the checkpoint's files.

    Raises:
        ConfigError: They cannot.
    """
    if config.method == BLOCKS:
        return
    if config.fsdp and not workers.gpus_per_worker:
        raise ConfigError("fsdp shards the parameters over GPUs, and the workers have none: leave it out")
    shared_batch(config, workers.num_workers)
    if workers.weights_travel:
        raise ConfigError(
            "the workers of a training read the checkpoint and write their own at the same paths on every node: put "
            "checkpoint, data and output on storage that all nodes see, and pass --shared-storage"
        )


def tuned_output(config: TuneConfig, inputs: TuneInputs) -> Destination:
    """Return where the tuned checkpoint goes: by default tuned/<checkpoint>."""
    return Destination.of(config.output or f"tuned/{inputs.name}")


def tracking_options(config: TuneConfig, inputs: TuneInputs | None) -> TrackingOptions:
    """Return the tracking options of a config; the run is nested in that of the pruning, if it is in the same place."""
    name = config.run_name or (None if inputs is None else f"{inputs.name}-{config.method}")
    return TrackingOptions(
        experiment=config.experiment,
        tracking_uri=config.tracking_uri,
        run_name=name,
        register=config.register,
        parent=None if inputs is None else stored_parent(inputs.model.directory),
    )
