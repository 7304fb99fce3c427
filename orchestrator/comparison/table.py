"""Writes a comparison's rows, one per model and held-out set, as JSON, CSV, Markdown and figures, or to a terminal."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.evaluation.results import TaskResult
from orchestrator.evaluation.table import markdown_of_tasks, print_tasks
from orchestrator.json_values import json_value
from orchestrator.record.figures import draw_perplexity_over_sparsity
from orchestrator.record.totals import HeldOut
from slimllm_ops.files import write_text

DENSE = "dense"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one set of held-out blocks.

    Attributes:
        method: The method that made the model; "dense" for the dense model.
        source: Whose method it is.
        sparsity: Fraction of the decoder layers' parameters that was removed.
        parameters: Parameters of the whole model.
        data: The held-out blocks.
        tokens: The tokens in those blocks.
        block_length: The length of those blocks.
        perplexity: The exponential of the loss.
        loss: Mean negative log-likelihood per token.
        gap: How far the loss is above the dense model's, as a fraction of the same for `slimllm` at the same sparsity;
            NaN if `slimllm` has no such gap.
        seconds: Time to choose and write the model, without the calibration pass that one-pass methods share.
    """

    method: str
    source: str
    sparsity: float
    parameters: int
    data: str
    tokens: int
    block_length: int
    perplexity: float
    loss: float
    gap: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ModelTasks:
    """One model's results on tasks.

    Attributes:
        method: The method that made the model; "dense" for the dense model.
        sparsity: Fraction of the decoder layers' parameters that was removed.
        results: The results, beside the dense model's.
    """

    method: str
    sparsity: float
    results: tuple[TaskResult, ...]

    @property
    def name(self) -> str:
        """The model's name in tables."""
        return self.method if self.method == DENSE else f"{self.method}, {self.sparsity:.1%}"


def gap_fraction(loss: float, dense: float, reference: float) -> float:
    """Return a loss's gap to the dense loss as a fraction of the reference's gap; NaN if the reference has none."""
    if not (math.isfinite(loss) and math.isfinite(reference)) or reference <= dense:
        return math.nan
    return (loss - dense) / (reference - dense)


def write_table(rows: Sequence[Row], tasks: Sequence[ModelTasks], header: dict[str, Any], directory: Path) -> None:
    """Write comparison.json, comparison.csv, comparison.md, and perplexity.png (perplexity-1.png for a second set)."""
    document = {"format": FORMAT} | header | {"rows": [_plain(asdict(row)) for row in rows]}
    document["tasks"] = [_described(model, one) for model in tasks for one in model.results]
    write_text(directory / "comparison.json", json.dumps(json_value(document), indent=1, allow_nan=False) + "\n")
    write_text(directory / "comparison.csv", as_csv(rows))
    write_text(directory / "comparison.md", as_markdown(rows, header) + markdown_of_tasks(_by_name(tasks)))
    for number, data in enumerate(_data(rows)):
        name = f"perplexity-{number}.png" if number else "perplexity.png"
        curves, dense = _curves([row for row in rows if row.data == data])
        draw_perplexity_over_sparsity(curves, dense, directory / name)


def _described(model: ModelTasks, result: TaskResult) -> dict[str, Any]:
    return {"model": model.name, "method": model.method, "sparsity": model.sparsity, **asdict(result)}


def _by_name(tasks: Sequence[ModelTasks]) -> dict[str, tuple[TaskResult, ...]]:
    return {one.name: one.results for one in tasks}


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, with all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_plain(asdict(row)) for row in rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row], header: dict[str, Any]) -> str:
    """Return a table for each set of held-out blocks, after a note on the model and the calibration."""
    lines = [f"# {header['model']}: methods at the same parameter count", ""]
    lines += [
        f"Calibration: {header['calibration']}, {header['calibration_tokens']:,} tokens. All one-pass methods "
        f"share one pass over them: {header['calibration_seconds']:.1f} s, which the last column leaves out.",
        "gap: how far the loss is above the dense model's, as a fraction of the same for `slimllm` at that sparsity.",
    ]
    for data in _data(rows):
        lines += [
            "",
            f"## {Path(data).name}",
            "",
            f"Perplexity on {_size(data, rows)}.",
            "",
            "| " + " | ".join(HEADINGS) + " |",
        ]
        lines.append("|---|---|" + "--:|" * (len(HEADINGS) - 2))
        # An unescaped bar (as in |W| |X|) would end the cell.
        cells = [[cell.replace("|", "\\|") for cell in _cells(row)] for row in rows if row.data == data]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def print_table(rows: Sequence[Row], tasks: Sequence[ModelTasks], console: Console) -> None:
    """Print a table for each set of held-out blocks, and for each task."""
    for data in _data(rows):
        table = Table(title=f"{Path(data).name}: {_size(data, rows)}")
        # A terminal is too narrow for the source of a method, which is in the files.
        shown = [number for number, heading in enumerate(HEADINGS) if heading != "source"]
        for number in shown:
            table.add_column(HEADINGS[number], justify="right" if number else "left", no_wrap=True)
        for row in rows:
            if row.data == data:
                table.add_row(*(_cells(row)[number] for number in shown))
        console.print(table)
    print_tasks(_by_name(tasks), console)


HEADINGS = ("method", "source", "sparsity", "parameters", "perplexity", "loss", "gap", "seconds")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        row.source,
        f"{row.sparsity:.2%}",
        f"{row.parameters:,}",
        f"{row.perplexity:,.3f}" if math.isfinite(row.perplexity) else "inf",
        f"{row.loss:.4f}",
        f"{row.gap:.3f}" if math.isfinite(row.gap) else "-",
        f"{row.seconds:.1f}",
    )


def _data(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.data for row in rows))


def _size(data: str, rows: Sequence[Row]) -> str:
    """Return the size of a set of held-out blocks in words."""
    return next(str(HeldOut(row.tokens, row.block_length)) for row in rows if row.data == data)


def _curves(rows: Sequence[Row]) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Return each method's pairs of sparsity and perplexity, and the dense model's perplexity."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row.method, []).append((row.sparsity, row.perplexity))
    ((_, dense),) = curves.pop(DENSE)
    return curves, dense


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row that JSON can hold: values that are not finite become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
