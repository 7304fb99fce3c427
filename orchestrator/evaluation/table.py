"""Writes an evaluation's results as JSON, CSV and Markdown, or prints them as tables."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.evaluation.results import ModelResult, TaskResult, TextResult
from orchestrator.evaluation.statistics import Difference
from orchestrator.json_values import json_value
from orchestrator.secrets import masked
from slimllm_ops.files import write_text

FORMAT = 1
# The title, the headings and the rows of a table.
TableParts = tuple[str, Sequence[str], list[tuple[str, ...]]]
EXPLANATION = """\
Loss in nats per token; bits per byte of text, which compare models with other tokenizers. KL is the divergence of a
model's predictions from the first model's, in nats per token: the mean, and by percentile. "Agreement" is the share of
tokens for which both models have the same most likely next token. "±" is the standard error of the value before it.
"Difference" is that to the first model, window by window or question by question; "p" is the probability of one as
large if the models were equally good (a paired z-test)."""
TEXT_HEADINGS = (
    *("model", "perplexity", "loss", "±", "difference", "±", "p", "bits per byte", "KL", "KL 50 / 90 / 99 %"),
    "agreement",
)
TASK_HEADINGS = ("model", "value", "±", "difference", "±", "p")
# A terminal is too narrow for all columns of a text.
ONLY_IN_FILES = (3, 5, 6, 9)


def write_tables(results: Sequence[ModelResult], header: dict[str, Any], directory: Path) -> list[Path]:
    """Write evaluation.json, evaluation.csv and evaluation.md, and return the files."""
    contents = {
        "evaluation.json": json.dumps(as_document(results, header), indent=1, allow_nan=False) + "\n",
        "evaluation.csv": as_csv(results),
        "evaluation.md": as_markdown(results),
    }
    for name, content in contents.items():
        write_text(directory / name, content)
    return [directory / name for name in contents]


def as_document(results: Sequence[ModelResult], header: dict[str, Any]) -> dict[str, Any]:
    """Return the results as JSON values, with all their digits."""
    models = [
        {
            "model": one.name,
            "digest": one.digest,
            "parameters": one.parameters,
            "perplexity": [_as_values(text) for text in one.texts],
            "tasks": [asdict(task) for task in one.tasks],
        }
        for one in results
    ]
    return json_value({"format": FORMAT} | header | {"models": models})


def _as_values(text: TextResult) -> dict[str, Any]:
    """Return a text's figures, with those that reports show under names of their own."""
    far = text.distance
    shown = {"kl": far.mean, "agreement": far.agreement} if far else {}
    return asdict(text) | {"value": text.perplexity} | shown


def as_csv(results: Sequence[ModelResult]) -> str:
    """Return a row for each model and figure, with all its digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "metric", "value"))
    writer.writerows((one.name, name, value) for one in results for name, value in one.metrics().items())
    return text.getvalue()


def as_markdown(results: Sequence[ModelResult]) -> str:
    """Return a table for each text and length, and for each task's metric, after an explanation."""
    return "\n".join(["# Evaluation", "", EXPLANATION, *_markdown_lines(_tables(results))]) + "\n"


def markdown_of_tasks(tasks: Mapping[str, Sequence[TaskResult]]) -> str:
    """Return a table for each task's metric, with a row for each model; "" without tasks."""
    return "".join(f"{line}\n" for line in _markdown_lines(_task_tables(tasks)))


def _markdown_lines(tables: Iterable[TableParts]) -> list[str]:
    lines = []
    for title, headings, rows in tables:
        lines += ["", f"## {title}", "", f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return lines


def print_tables(results: Sequence[ModelResult], console: Console) -> None:
    """Print the same tables, with fewer columns."""
    _print(_tables(results), console)


def print_tasks(tasks: Mapping[str, Sequence[TaskResult]], console: Console) -> None:
    """Print a table for each task's metric, with a row for each model."""
    _print(_task_tables(tasks), console)


def _print(tables: Iterable[TableParts], console: Console) -> None:
    for title, headings, rows in tables:
        table = Table(title=title)
        shown = [one for one in range(len(headings)) if headings == TASK_HEADINGS or one not in ONLY_IN_FILES]
        for number in shown:
            table.add_column(headings[number], justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(row[number] for number in shown))
        console.print(table)


def _tables(results: Sequence[ModelResult]) -> Iterable[TableParts]:
    yield from _by_title({one.name: one.texts for one in results}, _title_of_text, TEXT_HEADINGS, _text_cells)
    yield from _task_tables({one.name: one.tasks for one in results})


def _task_tables(tasks: Mapping[str, Sequence[TaskResult]]) -> Iterable[TableParts]:
    return _by_title(tasks, _title_of_task, TASK_HEADINGS, _task_cells)


def _by_title(
    results: Mapping[str, Sequence[Any]],
    title_of: Callable[[Any], str],
    headings: Sequence[str],
    cells: Callable[[Any], tuple[str, ...]],
) -> Iterable[TableParts]:
    tables: dict[str, list[tuple[str, ...]]] = {}
    for name, figures in results.items():
        for figure in figures:
            tables.setdefault(title_of(figure), []).append((masked(name), *cells(figure)))
    yield from ((title, headings, rows) for title, rows in tables.items())


def _title_of_text(one: TextResult) -> str:
    stride = f", every {one.stride:,}" if one.stride != one.length else ""
    return f"{Path(masked(one.data)).name}: {one.tokens:,} tokens in windows of {one.length:,}{stride}"


def _title_of_task(one: TaskResult) -> str:
    return f"{one.task}: {one.metric}" + (f", {one.questions:,} questions" if one.questions else "")


def _text_cells(one: TextResult) -> tuple[str, ...]:
    far = one.distance
    return (
        f"{one.perplexity:,.3f}" if math.isfinite(one.perplexity) else "inf",
        f"{one.loss:.4f}",
        _number(one.loss_stderr, "{:.4f}"),
        *_difference(None if far is None else far.loss),
        _number(one.bits_per_byte, "{:.4f}"),
        _number(far and far.mean, "{:.4f}"),
        "" if far is None else " / ".join(f"{value:.3f}" for value in far.percentiles.values()),
        _number(far and far.agreement, "{:.1%}"),
    )


def _task_cells(one: TaskResult) -> tuple[str, ...]:
    return f"{one.value:.4f}", _number(one.stderr, "{:.4f}"), *_difference(one.difference)


def _difference(one: Difference | None) -> tuple[str, ...]:
    if one is None:
        return "", "", ""
    return _number(one.mean, "{:+.4f}"), _number(one.stderr, "{:.4f}"), _number(one.p_value, "{:.2g}")


def _number(value: Any, form: str) -> str:
    return form.format(value) if value is not None and math.isfinite(value) else ""
