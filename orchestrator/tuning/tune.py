"""Tunes a pruned checkpoint from start to end: from a checkpoint and text to a better checkpoint and its record."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from actors.group import ShardGroup
from cluster import Resources, WorkerPlan
from orchestrator.config import ConfigError
from orchestrator.data.blocks import TokenBlocks, freeze
from orchestrator.output.destination import Destination, deliver_output, finish_delivery
from orchestrator.output.staging import Staging, open_staging
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import attempts
from orchestrator.pruning.backends import Backend, backend_of
from orchestrator.pruning.perplexity import measure_once
from orchestrator.pruning.run_context import open_session, open_shards, settle_workers
from orchestrator.pruning.targets import Draft
from orchestrator.record.run_toml import RUN_FILE
from orchestrator.record.totals import HeldOut
from orchestrator.tracking import Run, TrackingOptions, how_to_log, stored_parent, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting_output
from orchestrator.tuning.blocks import tune_blocks
from orchestrator.tuning.config import BLOCKS, TuneConfig
from orchestrator.tuning.estimate import require_room_to_train
from orchestrator.tuning.inputs import TuneInputs, load_tune_inputs
from orchestrator.tuning.params import tune_params, what_is_asked
from orchestrator.tuning.record import (
    log_inputs,
    log_record,
    write_outside,
    write_record,
    write_run_file,
    write_weights,
)
from orchestrator.tuning.result import TuneTotals, best_of
from orchestrator.tuning.training import shared_batch, train
from slimllm_ops.checkpoint import tokenizer
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.training.branches import BranchTraining
from slimllm_ops.training.outcome import Outcome
from slimllm_ops.training.tuned import tuned


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


@dataclass(frozen=True)
class TuneContext:
    """A training's settings, inputs, machines and places."""

    config: TuneConfig
    inputs: TuneInputs
    backend: Backend
    resources: Resources
    workers: WorkerPlan
    staging: Staging
    run: Run
    reporter: Reporter

    @contextmanager
    def shards(self) -> Iterator[ShardGroup]:
        """Hold workers that pass a model layer by layer."""
        arguments = (self.backend, self.resources, self.workers, self.staging, self.reporter)
        with open_shards(*arguments, offload=self.config.offload) as (_, shards):
            yield shards


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
        context = TuneContext(config, inputs, backend, resources, workers, staging, run, reporter)
        params = tune_params(config, inputs, workers)
        write_run_file(staging.directory / "pruning" / RUN_FILE, config, inputs, workers)
        log_inputs(run, params, inputs)
        link_with_job(run, reporter.warn)
        totals = _tune_by_blocks(context) if config.method == BLOCKS else _tune_whole(context)
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


def _tune_whole(context: TuneContext) -> TuneTotals:
    """Train the model as a whole, and write its best checkpoint, or the weights from before if none is better."""
    config, inputs, staging = context.config, context.inputs, context.staging
    alone = config.local or context.resources.local
    outcome = train(config, inputs, staging.solved / "training", context.workers, alone, context.run, context.reporter)
    best, saved = best_of(outcome), outcome.best
    if config.keep_worse and saved is not None:
        best = int(saved.metrics["step"])
    _tell_outcome(context, outcome, best)
    written = inputs.checkpoint
    if best and saved is not None:
        written = tuned(inputs.checkpoint, saved.directory)
    with context.reporter.timed("writing"):
        write_weights(written, staging.directory)
    return _totals(context, outcome, best, _perplexities(context))


def _tell_outcome(context: TuneContext, outcome: Outcome, best: int) -> None:
    """Warn of a training that diverged, or made nothing better.

    Raises:
        ConfigError: It diverged, and no step before was better than none.
    """
    config, diverged = context.config, outcome.diverged_at
    if diverged is not None:
        rate = f"learning rate {config.peak_learning_rate:g}"
        told = f"the loss or its gradient was not finite at step {diverged} with {rate}"
        if not best:
            raise ConfigError(
                f"{told}, and no step before it was better than the checkpoint as it is: pass a lower --learning-rate"
            )
        context.reporter.warn(f"{told}: the weights are those after step {best}, the best before it")
    elif not best:
        context.reporter.warn(
            f"no step made the held-out loss less than {outcome.losses[0]:.4f}: the weights stay as they were; to keep "
            f"the tuned ones, pass --keep-worse; to do better, pass a lower --learning-rate or more --data"
        )


def _tune_by_blocks(context: TuneContext) -> TuneTotals:
    """Train each branch on its own, layer by layer; write the weights from before if these are no better."""
    config, inputs, staging, reporter = context.config, context.inputs, context.staging, context.reporter
    source, pruned, plan = inputs.teacher, inputs.checkpoint, inputs.plan
    assert source is not None, "blocks has a dense model"
    assert plan is not None, "blocks has a plan"
    settings = BranchTraining(epochs=config.passes or 1, learning_rate=config.peak_learning_rate)
    draft = Draft.open(pruned, staging.directory, staging.solved / "tuned.log")
    with context.shards() as shards:
        tune_blocks(
            shards,
            source,
            pruned,
            plan.layers,
            inputs.data.input_ids_BT,
            draft,
            reporter,
            partial(attempts, shards, reporter),
            settings,
        )
    write_outside(draft.writer, pruned)
    steps = settings.epochs * len(inputs.data.input_ids_BT)
    validation = freeze(inputs.validation.spec, inputs.validation.input_ids_BT, 0, None)
    dense, before, after = _measure(context, Checkpoint.open(staging.directory), validation)
    losses = {0: math.log(before), steps: math.log(after)}
    outcome = Outcome((), steps, losses, teacher_loss=None if dense is None else math.log(dense))
    best = steps if config.keep_worse else best_of(outcome)
    _tell_outcome(context, outcome, best)
    if not best:
        write_weights(pruned, staging.directory)
    return _totals(context, outcome, best, _perplexities(context))


def _perplexities(context: TuneContext) -> dict[str, tuple[float | None, float, float]]:
    """Return the perplexities (dense, before, after) on each held-out text."""
    written = Checkpoint.open(context.staging.directory)
    return {blocks.spec: _measure(context, written, blocks) for blocks in context.inputs.held_out}


def _measure(context: TuneContext, written: Checkpoint, blocks: TokenBlocks) -> tuple[float | None, float, float]:
    """Return the perplexities (dense, before, after) on a text; None stands for a dense model that takes no part."""
    inputs = context.inputs
    with context.shards() as shards:

        def measure(name: str, model: Checkpoint) -> float:
            stage, known_as = f"perplexity, {name}", f"{name} {model.digest()}"
            return measure_once(shards, context.staging, context.reporter, model, blocks, stage, known_as)

        dense = None if inputs.teacher is None else measure("dense", inputs.teacher)
        return dense, measure("before", inputs.checkpoint), measure("after", written)


def _totals(
    context: TuneContext, outcome: Outcome, best: int, perplexity: dict[str, tuple[float | None, float, float]]
) -> TuneTotals:
    held_out = context.inputs.held_out
    return TuneTotals(
        steps=outcome.steps,
        best_step=best,
        kept=best > 0,
        loss_before=outcome.losses[0],
        loss_after=outcome.losses[best],
        loss_dense=outcome.teacher_loss,
        diverged_at=outcome.diverged_at,
        perplexity=perplexity,
        evaluated={one.spec: HeldOut(one.num_tokens, one.input_ids_BT.shape[1]) for one in held_out},
        tokens=context.inputs.data.num_tokens,
        seconds=dict(context.reporter.seconds),
        peak_memory=outcome.peak_memory,
    )


def require_sharing(config: TuneConfig, workers: WorkerPlan) -> None:
    """Check that the workers can share a step, and that they see the checkpoint's files.

    Raises:
        ConfigError: They cannot.
    """
    if config.method == BLOCKS:
        return
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
