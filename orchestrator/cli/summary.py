"""Prints the result of a run as a short table with paths, and describes it for JSON."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.table import print_table
from orchestrator.evaluation.table import print_tables
from orchestrator.pipeline import PruneResult
from orchestrator.preflight.dry_run import RunPlan
from orchestrator.preflight.estimate import readable
from orchestrator.record.sweep import sweep_cells, sweep_rows
from orchestrator.record.totals import Totals
from orchestrator.secrets import masked
from orchestrator.terminal import open_console
from orchestrator.tracking import JOURNAL_ONLY, how_to_log, where_to_look

# Each of these serves one command, which imports it when it runs.
if TYPE_CHECKING:
    from orchestrator.evaluation.evaluate import Evaluation
    from orchestrator.speed.bench import BenchResult
    from orchestrator.tuning.result import TuneTotals
    from orchestrator.tuning.tune import TuneResult


def print_summary(result: PruneResult, console: Console | None = None) -> None:
    """Print what pruning changed, how long it took, its memory, and the paths."""
    console = console or open_console()
    if not result.models:
        _print_lines(console, [f"{result.output} is finished: there is nothing to resume"])
        return
    console.print(_of_one(result.totals) if len(result.models) == 1 else _of_several(result))
    # Of several models, take the last one's totals; every model's totals include the stages that they share.
    totals = result.models[-1].totals
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in totals.seconds.items())
    peak = ", ".join(f"{kind} {size / 2**30:.2f} GiB" for kind, size in totals.peak_memory.items())
    # A run from saved moments that measures no perplexity has no workers.
    lines = [f"seconds: {stages}", *([f"peak memory of a worker: {peak}"] if peak else []), *_places(result)]
    found = f"MLflow run {result.run_id}: {_logged_models(result)}"
    _print_lines(console, [*lines, *_of_mlflow(result, result.log_command, found)])


def _of_one(totals: Totals) -> Table:
    """Return a table of what changed in one model."""
    table = Table()
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    _add_row(table, "parameters", totals.parameters_before, totals.parameters_after, "{:,}")
    _add_row(table, "  of the layers", totals.layer_parameters_before, totals.layer_parameters_after, "{:,}")
    if totals.layers_after < totals.layers_before:
        _add_row(table, "layers", totals.layers_before, totals.layers_after, "{:,}")
    _add_row(table, "weights, MB", totals.bytes_before / 1e6, totals.bytes_after / 1e6, "{:,.1f}")
    for spec, (dense, pruned) in totals.perplexity.items():
        _add_row(table, f"perplexity, {masked(Path(spec).name)}", dense, pruned, "{:,.3f}")
        table.add_row(f"  on {totals.evaluated[spec]}")
    for first, after in totals.tasks:
        _add_row(table, after.name, first.value, after.value, "{:,.4f}")
    return table


def _of_several(result: PruneResult) -> Table:
    """Return a table with a row for each model of a sweep."""
    rows = sweep_rows({model.name: model.totals for model in result.models})
    table = Table()
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(*sweep_cells(row))
    return table


def _places(result: PruneResult) -> list[str]:
    what = "checkpoint" if len(result.models) == 1 else "checkpoints, one in each folder"
    return [f"{what}: {result.output}"]


def _logged_models(result: PruneResult) -> str:
    return ", ".join(str(model.model_uri) for model in result.models)


def describe_result(result: PruneResult) -> dict[str, Any]:
    """Return a result as values for JSON: every model with its totals."""
    models = [asdict(model) | {"totals": describe_totals(model.totals)} for model in result.models]
    return asdict(result) | {"finished_before": not result.models, "models": models}


def describe_totals(totals: Totals) -> dict[str, Any]:
    """Return the figures of a run by name."""
    perplexity = {
        spec: {"before": before, "after": after, **asdict(totals.evaluated[spec])}
        for spec, (before, after) in totals.perplexity.items()
    }
    return asdict(totals) | {"sparsity": totals.sparsity, "perplexity": perplexity}


def print_plan(plan: RunPlan, console: Console | None = None) -> None:
    """Print what a run would take, stage by stage, and where it would write."""
    console, estimate = console or open_console(), plan.estimate
    table = Table()
    gpu = estimate.device == "cuda"
    for heading in ("stage", "a worker's GPU, MB" if gpu else "worker, MB", "solve, MB", "driver, MB"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in estimate.stages:
        sizes = [f"{size / 1e6:,.0f}" if size else "" for size in (stage.worker, stage.solve, stage.driver)]
        table.add_row(stage.name, *sizes)
    totals = [f"{size / 1e6:,.0f}" if size else "" for size in (estimate.worker, estimate.solve, estimate.driver)]
    table.add_row("maximum", *totals)
    console.print(table)
    workers = plan.workers
    has = f"{workers.cpus_per_worker} CPUs and {workers.gpus_per_worker:g} GPUs"
    travelling = {"of weights to each node": estimate.weights, "of moments": estimate.moments}
    travels = [f"{readable(estimate.tokens)} of tokens", *(f"{readable(v)} {k}" for k, v in travelling.items() if v)]
    written = {
        "while it runs": estimate.beside,
        "for MLflow": estimate.tracked,
        "of each worker in TMPDIR": estimate.spilled,
    }
    disk = [readable(estimate.output), *(f"{readable(v)} {k}" for k, v in written.items() if v)]
    lines = [
        f"workers: {workers.num_workers}, of {has} each",
        f"transfers: {', '.join(travels)}",
        f"disk: {', '.join(disk)}",
        *(f"{check.name}: {check.found}" for check in plan.checks if check.ok),
        f"output: {plan.output}",
    ]
    told = "memory is likely within 30 %; for time, look at a run's progress: it times its layers as they pass"
    _print_lines(console, [*lines, told])


def describe_plan(plan: RunPlan) -> dict[str, Any]:
    """Return what a run would take as values for JSON."""
    return asdict(plan) | {"estimate": plan.estimate.as_json()}


def print_tuned(result: "TuneResult", console: Console | None = None) -> None:
    """Print what a training changed, how long it took, and the paths."""
    console, totals = console or open_console(), result.totals
    if totals is None:
        _print_lines(console, [f"{result.output} is finished: there is nothing to resume"])
        return
    console.print(_of_training(totals))
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in totals.seconds.items())
    kept = f"the weights after step {totals.best_step} of {totals.steps}" if totals.kept else "the weights from before"
    found = f"MLflow run {result.run_id}: {result.model_uri}"
    lines = [f"kept: {kept}", f"seconds: {stages}", f"checkpoint: {result.output}"]
    _print_lines(console, [*lines, *_of_mlflow(result, result.log_command, found)])


def _of_training(totals: "TuneTotals") -> Table:
    """Return a table of the losses and perplexities of a training."""
    table = Table()
    for heading in ("", "dense", "before", "after", "recovered"):
        table.add_column(heading, justify="left" if not heading else "right")
    dense = "" if totals.loss_dense is None else f"{totals.loss_dense:.4f}"
    recovered = "" if totals.recovered is None else f"{totals.recovered:.1%}"
    table.add_row("held-out loss", dense, f"{totals.loss_before:.4f}", f"{totals.loss_after:.4f}", recovered)
    for spec, (first, before, after) in totals.perplexity.items():
        share = totals.recovered_on(spec)
        cells = ("" if first is None else f"{first:,.3f}", f"{before:,.3f}", f"{after:,.3f}")
        table.add_row(f"perplexity, {masked(Path(spec).name)}", *cells, "" if share is None else f"{share:.1%}")
        table.add_row(f"  on {totals.evaluated[spec]}")
    return table


def describe_tuned(result: "TuneResult") -> dict[str, Any]:
    """Return the result of a training as values for JSON."""
    totals = result.totals
    figures = None if totals is None else asdict(totals) | {"recovered": totals.recovered}
    return asdict(result) | {"finished_before": totals is None, "totals": figures}


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the results of the methods, and the paths."""
    console = console or open_console()
    print_table(comparison.rows, comparison.tasks, console)
    _print_places(console, comparison, "table and figure")


def print_evaluation(evaluation: "Evaluation", console: Console | None = None) -> None:
    """Print the figures of the models, and the paths."""
    console = console or open_console()
    print_tables(evaluation.models, console)
    _print_places(console, evaluation, "tables")


def _print_places(console: Console, result: "Comparison | Evaluation", written: str) -> None:
    """Print where the output is, and the run with a child for each model."""
    found = f"MLflow run {result.run_id}, with a child for each model"
    _print_lines(console, [f"{written}: {result.output}", *_of_mlflow(result, how_to_log(result.output), found)])


def print_bench(result: "BenchResult", console: Console | None = None) -> None:
    """Print the tables of a bench, and the paths."""
    from orchestrator.speed.table import print_figures

    console = console or open_console()
    print_figures(result.figures, console)
    command = None if result.output is None else how_to_log(result.output)
    found = f"MLflow run {result.run_id}, with a child for each model"
    tables = [] if result.output is None else [f"tables: {result.output}"]
    # Without an output, no journal is left to log later.
    logged = result.output is not None or result.run_id is not None
    _print_lines(console, [*tables, *(_of_mlflow(result, command, found) if logged else [])])


def describe_bench(result: "BenchResult") -> dict[str, Any]:
    """Return the result of a bench as values for JSON."""
    from orchestrator.speed.table import describe

    places = {name: getattr(result, name) for name in ("output", "tracking_uri", "experiment_id", "run_id")}
    return describe(result.figures) | places


def _of_mlflow(
    result: "PruneResult | Comparison | TuneResult | Evaluation | BenchResult", command: str | None, found: str
) -> list[str]:
    """Return lines on what MLflow has and where to look; if it lacks something, the last is a command to log it."""
    if command and result.tracking_uri == JOURNAL_ONLY:
        return ["MLflow was not used; to log this run later, run", command]
    if command:
        return ["MLflow does not have all of this run; when its server answers again, run", command]
    assert result.tracking_uri is not None, "a run in MLflow has a tracking URI"
    return [found, f"to look at it: {where_to_look(result.tracking_uri, result.experiment_id, result.run_id)}"]


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(masked(line), soft_wrap=True, markup=False)


def _add_row(table: Table, name: str, before: float, after: float, form: str) -> None:
    change = f"{after / before - 1:+.1%}" if math.isfinite(after) else ""
    table.add_row(name, form.format(before), form.format(after), change)
