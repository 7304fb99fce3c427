"""Compares the models of a sweep in a table and a figure of perplexity over sparsity, and logs both to MLflow."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.completion import REPORT_FILE
from orchestrator.record.figures import draw_perplexity_over_sparsity
from orchestrator.record.totals import Totals
from orchestrator.reports.page import write_report
from orchestrator.reports.sources import read_directory
from orchestrator.tracking import Run
from slimllm_ops.files import written_whole


def sweep_rows(models: Mapping[str, Totals]) -> list[dict[str, Any]]:
    """Return a row for each model, the dense one first: its sizes, its perplexity on each text, its tasks."""
    dense = next(iter(models.values()))
    before = {_heading(dense, data): perplexity for data, (perplexity, _) in dense.perplexity.items()}
    rows = [{"model": "dense", "sparsity": 0.0, "parameters": dense.parameters_before, "bytes": dense.bytes_before}]
    rows[0] |= before | {first.name: first.value for first, _ in dense.tasks}
    for name, totals in models.items():
        counts = {"sparsity": totals.sparsity, "parameters": totals.parameters_after, "bytes": totals.bytes_after}
        after = {_heading(totals, data): perplexity for data, (_, perplexity) in totals.perplexity.items()}
        after |= {pruned.name: pruned.value for _, pruned in totals.tasks}
        rows.append({"model": name, **counts, **after})
    return rows


def sweep_cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row's values formatted for reading."""
    forms = {"model": "{}", "sparsity": "{:.2%}", "parameters": "{:,}", "bytes": "{:,}"}
    return [forms.get(name, "{:,.3f}").format(value) for name, value in row.items()]


def log_sweep(run: Run, directory: Path, method: str, models: Mapping[str, Totals]) -> None:
    """Write sweep.csv, figures/perplexity.png and the report into a sweep's `pruning/`, and log them and the table.

    Args:
        run: The sweep's run; the models' runs are its children.
        directory: The sweep's output.
        method: The name of the curve.
        models: The totals of each model, by its name.
    """
    pruning, rows = directory / "pruning", sweep_rows(models)
    with (
        written_whole(pruning / "sweep.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    dense = next(iter(models.values()))
    for number, data in enumerate(dense.perplexity):
        # The figures are numbered from the second set of held-out blocks on.
        figure = pruning / "figures" / (f"perplexity-{number}.png" if number else "perplexity.png")
        points = [(totals.sparsity, totals.perplexity[data][1]) for totals in models.values()]
        draw_perplexity_over_sparsity({method: points}, rows[0][_heading(dense, data)], figure)
    write_report(pruning / REPORT_FILE, read_directory(directory))
    run.log_note(_markdown(rows))
    run.log_artifacts(pruning, to="pruning")


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---|" + "--:|" * (len(rows[0]) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(sweep_cells(row)) + " |" for row in rows)])


def _heading(totals: Totals, data: str) -> str:
    return f"perplexity, {Path(data).name} ({totals.evaluated[data]})"
