"""The short table at the end of a run, and where everything is."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.comparison import Comparison
from orchestrator.comparison_table import print_table
from orchestrator.pipeline import PruneResult


def print_summary(result: PruneResult, console: Console | None = None) -> None:
    """Print what pruning changed, what it took, and the paths."""
    console = console or Console(highlight=False)
    if not result.models:
        console.print(f"{result.output} is finished: there is nothing to resume", soft_wrap=True, markup=False)
        return
    totals = result.totals
    table = Table()
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    _add_row(table, "parameters", totals.parameters_before, totals.parameters_after, "{:,}")
    _add_row(table, "  of the layers", totals.layer_parameters_before, totals.layer_parameters_after, "{:,}")
    _add_row(table, "weights, MB", totals.bytes_before / 1e6, totals.bytes_after / 1e6, "{:,.1f}")
    for spec, (dense, pruned) in totals.perplexity.items():
        _add_row(table, f"perplexity, {Path(spec).name}", dense, pruned, "{:,.3f}")
    console.print(table)
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in totals.seconds.items())
    peak = ", ".join(f"{kind} {size / 2**30:.2f} GiB" for kind, size in totals.peak_memory.items())
    lines = [f"seconds: {stages}", f"peak memory of a worker: {peak}", f"checkpoint: {result.output}"]
    if result.tracking_uri is not None:
        lines += [
            f"MLflow run {result.run_id}: {result.model_uri}",
            f"to look at it: mlflow ui --backend-store-uri {result.tracking_uri}",
        ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print how the methods did, and the paths."""
    console = console or Console(highlight=False)
    print_table(comparison.rows, console)
    lines = [f"table and figure: {comparison.output}"]
    if comparison.tracking_uri is not None:
        lines += [
            f"MLflow run {comparison.run_id}, with a child for each model",
            f"to look at it: mlflow ui --backend-store-uri {comparison.tracking_uri}",
        ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _add_row(table: Table, name: str, before: float, after: float, form: str) -> None:
    change = f"{after / before - 1:+.1%}" if math.isfinite(after) else ""
    table.add_row(name, form.format(before), form.format(after), change)
