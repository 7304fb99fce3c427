"""Logs a run to MLflow: its inputs, the metrics of each layer, and the record of each checkpoint."""

from pathlib import Path
from typing import Any, Literal

from orchestrator.inputs import Inputs
from orchestrator.record.figures import LayerKept
from orchestrator.record.params import TOLD_OF_A_MODEL, for_people
from orchestrator.record.totals import Totals
from orchestrator.secrets import masked
from orchestrator.tracking import Run
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.models.families import layer_shape

# Digits of measurements in tags, which people read.
TAG_DIGITS = 4


def log_inputs(run: Run, params: dict[str, Any], inputs: Inputs) -> None:
    """Log the parameters and the data with their digests, before anything is computed."""
    run.log_params({name: value for name, value in for_people(params).items() if value is not None})
    one = inputs.calibration
    _log_dataset(run, "calibration", one.spec, one.digest, (one.num_blocks, one.block_length), one.num_tokens)
    for blocks in inputs.held_out:
        _log_dataset(run, "evaluation", blocks.spec, blocks.digest, blocks.input_ids_BT.shape, blocks.num_tokens)


def _log_dataset(
    run: Run,
    context: Literal["calibration", "evaluation"],
    spec: str,
    digest: str,
    shape: tuple[int, ...],
    num_tokens: int,
) -> None:
    num_blocks, length = shape
    source = masked(spec)
    run.log_dataset(Path(source).name, digest, context, source, num_blocks, length, num_tokens)


def log_layer(run: Run, source: Checkpoint, layer: int, plan: LayerPlan) -> dict[str, float]:
    """Log a layer's metrics with step = layer, and return them; skip a layer that an earlier attempt logged."""
    if layer in run.logged_steps:
        return {}
    metrics = _layer_metrics(source, layer, plan)
    run.log_metrics(metrics, step=layer)
    return metrics


def _layer_metrics(source: Checkpoint, layer: int, plan: LayerPlan) -> dict[str, float]:
    shape = layer_shape(source.config, layer)
    kept = LayerKept.of(source, layer, plan)
    metrics: dict[str, float] = {
        "heads_kept": kept.heads_kept,
        "key_value_heads_kept": kept.heads_kept * shape.num_key_value_heads // shape.num_attention_heads,
        "channels_kept": kept.channels_kept,
        "attention_relative_error": _relative_error(plan.attention),
        "mlp_relative_error": _relative_error(plan.mlp),
    }
    # Only the paper's method has similarities and ratios.
    if plan.similarity is not None and plan.ratio is not None:
        metrics |= {"cosine": plan.similarity, "ratio": plan.ratio}
    if plan.relative_change is not None:
        metrics["relative_change"] = plan.relative_change
    if plan.mlp is not None and source.family.mlp.has_experts:
        metrics["idle_experts"] = len(plan.mlp.idle_experts)
    return metrics


def log_record(
    run: Run, directory: Path, inputs: Inputs, target: str, params: dict[str, Any], totals: Totals
) -> str | None:
    """Log the totals, the record's files and the checkpoint; return the logged model's URI.

    Args:
        run: The target's run.
        directory: The checkpoint.
        inputs: The model and data that the run read.
        target: The target's name, which becomes the checkpoint's alias if it is registered.
        params: The settings that made the checkpoint.
        totals: The figures of the run.
    """
    description = describe_checkpoint(inputs.name, params["method"], totals)
    run.log_metrics(totals.metrics())
    run.log_note(description)
    run.log_artifacts(directory / "pruning", to="pruning")
    told = {
        "sparsity": params["sparsity"] or round(totals.sparsity, TAG_DIGITS),
        "parameters": totals.parameters_after,
    }
    return run.log_checkpoint(
        directory,
        f"{inputs.name}-{target}",
        told | {name: value for name, value in for_people(params).items() if name in TOLD_OF_A_MODEL and value},
        measured={name: round(value, TAG_DIGITS) for name, value in totals.measured().items()},
        alias=target,
        description=description,
    )


def describe_checkpoint(name: str, method: str, totals: Totals) -> str:
    """Return one line that says how a model was pruned, and at what cost in perplexity."""
    # The registry's table shows about thirty characters, so what differs between versions comes first.
    costs = [
        f"perplexity {pruned:.2f} (dense {dense:.2f}) on {Path(data).name}, {totals.evaluated[data]}"
        for data, (dense, pruned) in totals.perplexity.items()
    ]
    return "; ".join([*costs, f"{name} pruned by {totals.sparsity:.1%} with {method}"])


def _relative_error(decision: Decision | None) -> float:
    return 0.0 if decision is None else decision.relative_error
