"""The story of a run, from a model and text to a pruned checkpoint and its record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import actors
import slimllm_ops
from actors import ShardGroup
from cluster import ClusterError, plan_workers, session
from orchestrator.config import ConfigError, PruneConfig
from orchestrator.data import DataError
from orchestrator.evaluation import evaluate
from orchestrator.inputs import Inputs, into_batches, load_inputs
from orchestrator.layerwise import PRUNED, allocate, prune_layer
from orchestrator.output import staged
from orchestrator.progress import Reporter
from orchestrator.record import (
    Totals,
    count_totals,
    log_inputs,
    log_layer,
    log_record,
    run_params,
    write_record,
)
from orchestrator.tracking import Run, TrackingError, TrackingOptions, tracked_run
from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.errors import InputError
from slimllm_ops.plan import LayerPlan
from slimllm_ops.read_back import read_back
from slimllm_ops.writer import CheckpointWriter

# What whoever runs this can mend; everything else is a bug, or a machine that failed.
USER_ERRORS = (ConfigError, DataError, InputError, ClusterError, TrackingError)
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What a run gave: the checkpoint's directory, its totals, and where MLflow has them (None: nowhere)."""

    output: Path
    totals: Totals
    tracking_uri: str | None
    experiment_id: str | None
    run_id: str | None
    model_uri: str | None


def prune(config: PruneConfig, reporter: Reporter | None = None) -> PruneResult:
    """Prune a model as a config asks; the command line ends here too.

    Raises:
        ConfigError, DataError, CheckpointError, InputError, ClusterError, TrackingError: what was asked cannot be
            done as asked; nothing is left behind.
    """
    reporter = reporter or Reporter()
    with reporter.timed("inputs"):
        inputs = load_inputs(config)
    output = Path(config.output or default_output(config, inputs.name))
    with (
        staged(output, config.overwrite) as staging,
        session(config.address, (actors, slimllm_ops)) as resources,
        tracked_run(_tracking(config), staging / "pruning" / "metrics.jsonl", reporter.warn) as run,
    ):
        workers = plan_workers(resources, config.workers, config.gpus_per_worker)
        params = run_params(config, inputs, workers)
        log_inputs(run, params, inputs)
        with reporter.timed("start workers"):
            shards = ShardGroup.start(workers.num_workers, workers.cpus_per_worker, workers.gpus_per_worker)
        with shards:
            totals = _prune(config, inputs, params, shards, staging, run, reporter)
        model_uri = log_record(run, staging, inputs.name, totals)
        return PruneResult(
            output=output,
            totals=totals,
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
            model_uri=model_uri,
        )


def default_output(config: PruneConfig, name: str) -> str:
    """Return where the checkpoint goes if the config does not say: pruned/<model>-<sparsity>."""
    asked = f"ratio-{config.ratio:g}" if config.ratio is not None else f"{config.target_sparsity:g}"
    return f"pruned/{name}-{asked}"


def _prune(
    config: PruneConfig,
    inputs: Inputs,
    params: dict[str, Any],
    shards: ShardGroup,
    staging: Path,
    run: Run,
    reporter: Reporter,
) -> Totals:
    """Measure, allocate, prune, read back, evaluate, record."""
    source = inputs.source
    batches, tokens = into_batches(inputs.calibration), inputs.calibration.input_ids_BT.size
    shards.open_stream(DENSE, str(source.directory), batches)
    layers = reporter.layers("layer similarities", source.num_layers, tokens)
    similarities = [shards.forward(DENSE, layer) for layer in layers]
    shards.close_stream(DENSE)
    budget = allocate(config, source, similarities)
    if budget.note:
        reporter.note(budget.note)

    writer = CheckpointWriter(source, staging)
    shards.open_stream(PRUNED, str(source.directory), batches)
    ids, states = shards.probed_ids(PRUNED), [shards.probe(PRUNED)]
    for layer in reporter.layers("pruning", source.num_layers, tokens):
        decisions = prune_layer(shards, source, layer, budget.layers[layer], config.keep_lowest)
        plan = LayerPlan(similarities[layer], budget.layers[layer].ratio, *decisions)
        writer.commit(plan)
        log_layer(run, source, layer, plan)
        states.append(shards.probe(PRUNED))
    shards.close_stream(PRUNED)
    writer.finish()
    pruned = Checkpoint.open(staging)

    with reporter.timed("read back"):
        error = read_back(pruned, ids, states, shards.compute_dtype)
    perplexity = {
        blocks.spec: (
            evaluate(shards, source, blocks, reporter, "perplexity, dense"),
            evaluate(shards, pruned, blocks, reporter, "perplexity, pruned"),
        )
        for blocks in inputs.held_out
    }
    totals = count_totals(inputs, pruned, perplexity, reporter.seconds, shards.peak_memory(), error)
    write_record(staging, params, inputs, writer.layers, totals)
    return totals


def _tracking(config: PruneConfig) -> TrackingOptions:
    return TrackingOptions(
        experiment=config.experiment,
        tracking_uri=config.tracking_uri,
        run_name=config.run_name,
        register=config.register,
    )
