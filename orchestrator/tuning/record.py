"""Writes the tuned checkpoint with its record, and logs it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from cluster import WorkerPlan
from orchestrator.completion import REPORT_FILE
from orchestrator.data.blocks import TokenBlocks
from orchestrator.data.examples import Examples
from orchestrator.record.params import versions
from orchestrator.record.run_toml import RUN_FILE
from orchestrator.reports.page import write_report
from orchestrator.reports.values import Sources, run_of
from orchestrator.secrets import masked, masked_all, uris_masked
from orchestrator.settings import declared
from orchestrator.tracking import Run
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.inputs import PLAN, TuneInputs
from orchestrator.tuning.params import OF_AN_ATTEMPT, PLACES, settings_of
from orchestrator.tuning.result import TuneTotals
from slimllm_ops.checkpoint.companions import plan_record
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan, Plan
from slimllm_ops.files import read_plain, stays_inside, write_text

CARD = Path("README.md")
# The largest model card that is read.
MOST_BYTES = 1 << 22
# The files of the pruning's record that the training writes anew.
OWN = ("metrics.jsonl", RUN_FILE, PLAN.name)
NEW_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [slimllm]
---

# {name}
"""
SECTION = """
## Tuned

Tuned with slimllm (method `{method}`{adapters}) on {sequences:,} sequences of `{data}` (digest `{digest}`),
seed {seed}: {steps:,} steps of {batch_size} sequences{teacher}. {kept}

| | {dense_heading}before | after |
|---|{dense_line}---|---|
| loss on `{validation}` | {dense_loss}{loss_before:.4f} | {loss_after:.4f} |
{perplexity}"""


def write_weights(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint, which may have changed tensors, with its config and tokenizer."""
    writer = CheckpointWriter(checkpoint, directory)
    for layer in range(checkpoint.num_layers):
        writer.write_layer(layer, LayerPlan())
    write_outside(writer, checkpoint)


def write_outside(writer: CheckpointWriter, checkpoint: Checkpoint) -> None:
    """Write everything but the layers, as the checkpoint has it."""
    if getattr(checkpoint.config, "num_attention_heads_per_layer", None) is None:
        writer.finish_as(checkpoint.config.to_dict())
    else:
        writer.finish([LayerPlan()] * checkpoint.num_layers)


def write_run_file(path: Path, config: TuneConfig, inputs: TuneInputs, workers: WorkerPlan) -> None:
    """Write the settings to a TOML file that repeats the training: `slimllm tune --config FILE --output DIR`."""
    settled = {
        "learning_rate": config.peak_learning_rate,
        "batch_size": config.sequences_per_step,
        "data": inputs.data.pinned or inputs.data.spec,
        "workers": workers.num_workers,
        "gpus_per_worker": workers.gpus_per_worker,
    }
    asked = {name: getattr(config, name) for name in declared(TuneConfig) if name not in OF_AN_ATTEMPT | PLACES}
    values = {name: value for name, value in (asked | settled).items() if value is not None}
    lines = [
        f"to repeat this training: slimllm tune --config {RUN_FILE} --output DIR",
        f"weights of {inputs.name}: {inputs.digest}",
        f"tokens of {inputs.data.spec}: {inputs.data.digest}",
        ", ".join(f"{package} {found}" for package, found in versions().items()),
    ]
    header = "".join(f"# {line}\n" for line in map(uris_masked, lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{header}\n{tomli_w.dumps(masked_all(values, uris_masked))}")


def write_record(directory: Path, params: dict[str, Any], inputs: TuneInputs, totals: TuneTotals) -> None:
    """Write the pruning's record with what the training did, the report of both, and the model card."""
    record = plan_record(inputs.checkpoint.directory)
    kept = tuple(file for file in record.files if file.name not in OWN)
    replace(record, files=kept).copy(directory)
    plan = inputs.plan or Plan({"format": 1, "params": {}}, ())
    done = {"params": settings_of(params), "totals": masked_all(totals.reproducible_figures(), uris_masked)}
    tuned = [*plan.header.get("tuned", []), done]
    tuned_plan = Plan(plan.header | {"tuned": tuned}, plan.layers)
    tuned_plan.write(directory / PLAN)
    report = directory / PLAN.parent / REPORT_FILE
    write_report(report, Sources(runs=(run_of(tuned_plan, totals.seconds),)))
    write_text(directory / CARD, uris_masked(_card_of(inputs) + _section(params, inputs, totals)))


def _card_of(inputs: TuneInputs) -> str:
    """Return the model card of the checkpoint before the training."""
    directory = inputs.checkpoint.directory
    if (directory / CARD).is_file() and stays_inside(directory / CARD, directory):
        return read_plain(directory / CARD, MOST_BYTES).decode("utf-8", errors="replace").rstrip() + "\n"
    return NEW_CARD.format(name=inputs.name)


def _section(params: dict[str, Any], inputs: TuneInputs, totals: TuneTotals) -> str:
    """Return the section of the model card that says what the training did."""
    measured = [totals.loss_dense, *(dense for dense, _, _ in totals.perplexity.values())]
    has_dense = any(one is not None for one in measured)
    return SECTION.format(
        method=params["method"],
        adapters=f", LoRA of rank {params['rank']}" if "rank" in params else "",
        sequences=len(inputs.data.input_ids_BT),
        data=inputs.data.spec,
        digest=inputs.data.digest[:16],
        seed=params["seed"],
        steps=totals.steps,
        batch_size=params["batch_size"],
        teacher=f", towards `{params['teacher']}`" if inputs.teacher else "",
        kept=_told(totals),
        dense_heading="dense | " if has_dense else "",
        dense_line="---|" if has_dense else "",
        validation=inputs.validation.spec,
        dense_loss=_dense_cell(totals.loss_dense, "{:.4f}") if has_dense else "",
        loss_before=totals.loss_before,
        loss_after=totals.loss_after,
        perplexity="".join(_perplexity_rows(totals, has_dense)),
    )


def _perplexity_rows(totals: TuneTotals, has_dense: bool) -> list[str]:
    rows = []
    for spec, (dense, before, after) in totals.perplexity.items():
        first = _dense_cell(dense, "{:.2f}") if has_dense else ""
        rows.append(f"| perplexity on `{spec}`, {totals.evaluated[spec]} | {first}{before:.2f} | {after:.2f} |\n")
    return rows


def _dense_cell(value: float | None, form: str) -> str:
    return f"{'' if value is None else form.format(value)} | "


def _told(totals: TuneTotals) -> str:
    if totals.kept:
        return f"The weights are those after step {totals.best_step}, the best of the evaluated ones."
    return "No step made the held-out loss less, so the weights are those from before the training."


def log_inputs(run: Run, params: dict[str, Any], inputs: TuneInputs) -> None:
    """Log the parameters and the data with their digests, before anything is computed."""
    run.log_params(masked_all({name: value for name, value in params.items() if value is not None}))
    _log_sequences(run, "training", inputs.data)
    _log_sequences(run, "validation", inputs.validation)
    for blocks in inputs.held_out:
        _log_sequences(run, "evaluation", blocks)


def _log_sequences(run: Run, context: str, data: Examples | TokenBlocks) -> None:
    spec, (number, length) = masked(data.spec), data.input_ids_BT.shape
    run.log_dataset(Path(spec).name, data.digest, context, spec, number, length, data.num_tokens)


def log_record(run: Run, directory: Path, inputs: TuneInputs, params: dict[str, Any], totals: TuneTotals) -> str | None:
    """Log the totals, the record's files and the checkpoint; return the logged model's URI."""
    description = describe(inputs, params, totals)
    run.log_metrics(totals.metrics())
    run.log_note(description)
    run.log_artifacts(directory / "pruning", to="pruning")
    told = {name: params[name] for name, one in declared(TuneConfig).items() if one.tags_models and params.get(name)}
    return run.log_checkpoint(
        directory,
        f"{inputs.name}-tuned",
        masked_all(told | {"checkpoint_digest": inputs.digest, "steps": totals.best_step}),
        measured={"loss_before": round(totals.loss_before, 4), "loss_after": round(totals.loss_after, 4)},
        alias="tuned",
        description=description,
    )


def describe(inputs: TuneInputs, params: dict[str, Any], totals: TuneTotals) -> str:
    """Return one line that says how a checkpoint was tuned, and what came back."""
    costs = [
        f"perplexity {after:.2f} (before {before:.2f}) on {Path(spec).name}{_share(totals.recovered_on(spec))}"
        for spec, (_, before, after) in totals.perplexity.items()
    ]
    loss = f"held-out loss {totals.loss_after:.4f} (before {totals.loss_before:.4f}){_share(totals.recovered)}"
    return "; ".join([*costs, loss, f"{inputs.name} tuned with {params['method']}"])


def _share(recovered: float | None) -> str:
    return "" if recovered is None else f", {recovered:.0%} of the gap to the dense model came back"
