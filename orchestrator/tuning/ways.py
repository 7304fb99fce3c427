"""The ways to train: the model as a whole (`distil`, `lora`, `full`), or each branch on its own (`blocks`).

Each writes the best weights, or those from before if none is better, and returns the figures.
"""

from functools import partial

from orchestrator.data.blocks import freeze
from orchestrator.pruning.attempts import attempts
from orchestrator.pruning.targets import Draft
from orchestrator.record.totals import HeldOut
from orchestrator.tuning.blocks import tune_blocks
from orchestrator.tuning.context import Measured, TuneContext
from orchestrator.tuning.record import write_outside, write_weights
from orchestrator.tuning.result import TuneTotals, best_of
from orchestrator.tuning.training import train
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.training.branches import BranchTraining
from slimllm_ops.training.outcome import STEP, Outcome
from slimllm_ops.training.tuned import tuned


def tune_whole(context: TuneContext) -> TuneTotals:
    """Train the model as a whole."""
    config, inputs, staging = context.config, context.inputs, context.staging
    outcome = train(context)
    best, saved = best_of(outcome), outcome.best
    if config.keep_worse and saved is not None:
        best = int(saved.metrics[STEP])
    _tell(context, outcome, best)
    written = tuned(inputs.checkpoint, saved.directory) if best and saved is not None else inputs.checkpoint
    with context.reporter.timed("writing"):
        write_weights(written, staging.directory)
    with context.shards() as shards:
        return _totals(context, outcome, best, context.measure_held_out(shards))


def tune_by_blocks(context: TuneContext) -> TuneTotals:
    """Train each branch on its own, layer by layer."""
    config, inputs, staging, reporter = context.config, context.inputs, context.staging, context.reporter
    source, pruned, plan = inputs.teacher, inputs.checkpoint, inputs.plan
    assert source is not None, "blocks has a dense model"
    assert plan is not None, "blocks has a plan"
    settings = BranchTraining(epochs=config.passes or 1, learning_rate=config.peak_learning_rate)
    blocks_BT = inputs.data.input_ids_BT
    draft = Draft.open(pruned, staging.directory, staging.solved / "tuned.log")
    with context.shards() as shards:
        keeping = partial(attempts, shards, reporter)
        tune_blocks(shards, source, pruned, plan.layers, blocks_BT, draft, reporter, keeping, settings)
        write_outside(draft.writer, pruned)
        validation = freeze(inputs.validation.spec, inputs.validation.input_ids_BT, 0, None)
        measured = context.measure(shards, Checkpoint.open(staging.directory), validation)
        dense, before, after = measured.losses()
        steps = settings.epochs * len(blocks_BT)
        outcome = Outcome((), steps, {0: before, steps: after}, teacher_loss=dense)
        best = steps if config.keep_worse else best_of(outcome)
        _tell(context, outcome, best)
        if not best:
            write_weights(pruned, staging.directory)
        return _totals(context, outcome, best, context.measure_held_out(shards))


def _tell(context: TuneContext, outcome: Outcome, best: int) -> None:
    """Warn of a training that diverged, or made nothing better.

    Raises:
        NonFiniteError: It diverged, and no step before was better than none.
    """
    config, diverged = context.config, outcome.diverged_at
    if diverged is not None:
        rate = f"learning rate {config.peak_learning_rate:g}"
        told = f"the loss or its gradient was not finite at step {diverged} with {rate}"
        if not best:
            raise NonFiniteError(
                f"{told}, and no step before it was better than the checkpoint as it is: pass a lower --learning-rate"
            )
        context.reporter.warn(f"{told}: the weights are those after step {best}, the best before it")
    elif not best:
        context.reporter.warn(
            f"no step made the held-out loss less than {outcome.losses[0]:.4f}: the weights stay as they were; to keep "
            f"the tuned ones, pass --keep-worse; to do better, pass a lower --learning-rate or more --data"
        )


def _totals(context: TuneContext, outcome: Outcome, best: int, measured: dict[str, Measured]) -> TuneTotals:
    return TuneTotals(
        steps=outcome.steps,
        best_step=best,
        kept=best > 0,
        loss_before=outcome.losses[0],
        loss_after=outcome.losses[best],
        loss_dense=outcome.teacher_loss,
        diverged_at=outcome.diverged_at,
        perplexity={spec: (one.dense, one.before, one.after) for spec, one in measured.items()},
        evaluated={one.spec: HeldOut(one.num_tokens, one.input_ids_BT.shape[1]) for one in context.inputs.held_out},
        tokens=context.inputs.data.num_tokens,
        seconds=dict(context.reporter.seconds),
        peak_memory=outcome.peak_memory,
    )
