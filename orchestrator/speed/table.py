"""Writes what a bench measured as JSON, CSV and Markdown, or to a terminal."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Shown

from orchestrator.json_values import json_value
from orchestrator.speed.inputs import BenchModel
from orchestrator.speed.result import Row
from orchestrator.speed.widths import Sweep
from slimllm_ops.files import write_text

FORMAT = 1
RATIOS = (
    "Ratios are to the first model, round by round: the median, and the least and greatest. 'promised' is the ratio of "
    "multiply-accumulates of a prompt, and 'share' the ratio for prompts as a share of it."
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All that a bench measured.

    Attributes:
        engine: The engine, and what it computed on.
        settings: What was asked.
        models: The models.
        rows: The figures, by shape and model.
        rounds: The seconds of each generation.
        profiles: Where the time of a prompt's pass goes: seconds by kind, for each shape and model.
        sweeps: What the models' widths cost.
    """

    engine: str
    settings: dict[str, Any]
    models: tuple[BenchModel, ...]
    rows: tuple[Row, ...]
    rounds: list[dict[str, Any]]
    profiles: list[dict[str, Any]]
    sweeps: list[Sweep]


@dataclass(frozen=True)
class Table:
    """A table of text; its first columns are words, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def write_figures(figures: Figures, directory: Path) -> None:
    """Write bench.json, bench.csv and bench.md."""
    document = json.dumps(describe(figures), indent=1, allow_nan=False)
    write_text(directory / "bench.json", document + "\n")
    write_text(directory / "bench.csv", as_csv(figures.rows))
    write_text(directory / "bench.md", as_markdown(figures))


def describe(figures: Figures) -> dict[str, Any]:
    """Return the figures as values for JSON."""
    models = [
        {
            "name": model.name,
            "place": str(model.place),
            "bytes": model.num_bytes,
            "parameters": model.parameters,
            "macs": None if model.macs is None else asdict(model.macs),
        }
        for model in figures.models
    ]
    described = {
        "format": FORMAT,
        "engine": figures.engine,
        "settings": figures.settings,
        "models": models,
        "rows": [asdict(row) for row in figures.rows],
        "rounds": figures.rounds,
        "profiles": figures.profiles,
        "widths": [asdict(sweep) | {"advice": sweep.advice} for sweep in figures.sweeps],
    }
    plain: dict[str, Any] = json_value(described)
    return plain


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, with all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_markdown(figures: Figures) -> str:
    """Return the tables, after a note on the engine and on the ratios."""
    lines = [f"# Speed of {', '.join(model.name for model in figures.models)}", "", f"{figures.engine}. {RATIOS}"]
    for table in tables_of(figures):
        rule = ["---" if number == 0 else "---:" for number in range(len(table.headings))]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.headings, rule, *table.rows)]
        lines += ["", f"## {table.title}", "", *(f"| {' | '.join(row)} |" for row in cells)]
    advice = [sweep.advice for sweep in figures.sweeps]
    return "\n".join([*lines, *(["", *(f"- {line}" for line in advice)] if advice else [])]) + "\n"


def print_figures(figures: Figures, console: Console) -> None:
    """Print the tables and the advice."""
    console.print(figures.engine, soft_wrap=True)
    for table in tables_of(figures):
        shown = Shown(title=table.title)
        for number, heading in enumerate(table.headings):
            shown.add_column(heading, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for sweep in figures.sweeps:
        console.print(sweep.advice, soft_wrap=True)


def tables_of(figures: Figures) -> Iterator[Table]:
    """Yield the tables: sizes, speeds, ratios, where the time goes, and widths."""
    yield Table("Size", SIZE, [_size(model) for model in figures.models])
    yield Table("Speed", SPEED, [_speed(row) for row in figures.rows])
    if len(figures.models) > 1:
        rows = [_ratio(row) for row in figures.rows if row.model != figures.models[0].name]
        yield Table(f"Ratios to {figures.models[0].name}", RATIO, rows)
    if figures.profiles:
        kinds = tuple(f"{kind}, ms" for kind in figures.profiles[0]["seconds"])
        rows = [
            (one["model"], _shape(one["batch_size"], one["prompt_length"]), *map(_ms, one["seconds"].values()))
            for one in figures.profiles
        ]
        yield Table(
            "Where the time of a prompt goes, in the fastest of a few profiled passes",
            ("model", "prompts", *kinds),
            rows,
        )
    if figures.sweeps:
        multiples = sorted({multiple for sweep in figures.sweeps for multiple in sweep.costs})
        headings = ("model", "units", *(f"by {multiple}" for multiple in multiples))
        yield Table(
            "Time of the same work by widths, rounded up", headings, [_cost(one, multiples) for one in figures.sweeps]
        )


SIZE = ("model", "parameters", "MB on disk", "million MACs per token")
SPEED = (
    *("model", "prompts", "prompt tokens/s", "new tokens/s", "first token, ms", "later tokens, ms: p50, p90, p99"),
    "peak MB",
)
RATIO = ("model", "prompts", "prompt speed", "new token speed", "promised", "share")


def _size(model: BenchModel) -> tuple[str, ...]:
    parameters = "-" if model.parameters is None else f"{model.parameters:,}"
    macs = "-" if model.macs is None else f"{model.macs.per_token / 1e6:,.4g}"
    return model.name, parameters, f"{model.num_bytes / 1e6:,.1f}", macs


def _shape(batch_size: int, length: int) -> str:
    return f"{batch_size} x {length}"


def _speed(row: Row) -> tuple[str, ...]:
    on_gpu = "" if row.peak_gpu_memory is None else f", GPU {row.peak_gpu_memory / 1e6:,.0f}"
    return (
        row.model,
        _shape(row.batch_size, row.prompt_length),
        f"{row.prefill_tokens_per_second:,.1f}",
        f"{row.decode_tokens_per_second:,.1f}",
        _ms(row.first_token_seconds),
        ", ".join(map(_ms, (row.token_p50, row.token_p90, row.token_p99))),
        f"{row.peak_memory / 1e6:,.0f}{on_gpu}",
    )


def _ratio(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        _shape(row.batch_size, row.prompt_length),
        f"{row.prefill_ratio:.2f} ({row.prefill_low:.2f} to {row.prefill_high:.2f})",
        f"{row.decode_ratio:.2f} ({row.decode_low:.2f} to {row.decode_high:.2f})",
        "-" if row.promised is None else f"{row.promised:.2f}",
        "-" if row.share is None else f"{row.share:.2f}",
    )


def _cost(sweep: Sweep, multiples: Sequence[int]) -> tuple[str, ...]:
    costs = (sweep.costs.get(multiple) for multiple in multiples)
    return sweep.model, sweep.kind.units, *("-" if cost is None else f"{cost:.2f}" for cost in costs)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
