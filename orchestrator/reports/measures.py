"""Makes the sections about what was measured: perplexity and tasks over sparsity, methods side by side, speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.reports.figures import draw_bars, draw_over_sparsity
from orchestrator.reports.parts import Drawing, Section, Table, is_finite, shown_number
from orchestrator.reports.svg import svg_of
from orchestrator.reports.values import MeasuredModel, ReportedRun, Sources, mapping_at, number_at, pairs_at, rows_at

DENSE = "dense"
PERPLEXITY = "perplexity"
TASK_COLUMNS = ("task", "metric", "value", "stderr")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value of one model: what was measured, the method that made the model (`DENSE` for none), its sparsity."""

    measure: str
    title: str
    method: str
    sparsity: float
    value: Any


def points_of(sources: Sources) -> list[Point]:
    """Return every value that belongs to a model of known sparsity."""
    points = [point for run in sources.runs for point in _of_run(run)]
    points += [point for one in sources.comparisons for point in _of_comparison(one)]
    return points + [point for one in sources.evaluations for point in _of_evaluation(one, sources.runs)]


def _of_run(run: ReportedRun) -> list[Point]:
    """Return the perplexities in a plan: of the dense model, after the pruning, and after the last training."""
    points = []
    pruned = run.method.partition(", then ")[0]
    for totals, methods in ((run.totals, (DENSE, pruned)), (_last(run), (DENSE, "", run.method))):
        for spec, values in mapping_at(totals, "perplexity").items():
            title = _title(run.model, spec, mapping_at(mapping_at(totals, "evaluated"), spec))
            for method, value in zip(methods, values if isinstance(values, list) else (), strict=False):
                sparsity = 0.0 if method == DENSE else run.sparsity
                if method and value is not None and sparsity is not None:
                    points.append(Point(measure=PERPLEXITY, title=title, method=method, sparsity=sparsity, value=value))
    for pair in pairs_at(run.totals, "tasks"):
        for method, sparsity, result in zip((DENSE, pruned), (0.0, run.sparsity), pair, strict=True):
            points += [] if sparsity is None else [_of_task(result, method, sparsity)]
    return points


def _of_task(result: Mapping[str, Any], method: str, sparsity: float) -> Point:
    measure, title = str(result.get("metric")), str(result.get("task"))
    return Point(measure=measure, title=title, method=method, sparsity=sparsity, value=result.get("value"))


def _last(run: ReportedRun) -> Mapping[str, Any]:
    return mapping_at(run.trainings[-1], "totals") if run.trainings else {}


def _title(model: str, spec: str, size: Mapping[str, Any]) -> str:
    tokens, length = number_at(size, "tokens"), number_at(size, "block_length")
    sizes = f", {tokens:,} tokens in blocks of {length:,}" if tokens and length else ""
    return f"{model} on {Path(spec).name}{sizes}"


def _of_comparison(held: Mapping[str, Any]) -> list[Point]:
    points = []
    for row in rows_at(held, "rows"):
        sparsity = number_at(row, "sparsity")
        if sparsity is not None:
            title = _title(Path(str(held.get("model"))).name, str(row.get("data")), row)
            method, value = str(row.get("method")), row.get(PERPLEXITY)
            points.append(Point(measure=PERPLEXITY, title=title, method=method, sparsity=sparsity, value=value))
    for row in rows_at(held, "tasks"):
        sparsity = number_at(row, "sparsity")
        points += [] if sparsity is None else [_of_task(row, str(row.get("method")), sparsity)]
    return points


def _of_evaluation(one: MeasuredModel, runs: Sequence[ReportedRun]) -> list[Point]:
    """Return the values of a measured model, if it is one of the runs or the dense model of one."""
    name = Path(one.model).name
    run = next((run for run in runs if name in (run.name, run.directory and run.directory.name)), None)
    is_dense = run is None and name in (DENSE, *(run.model for run in runs))
    sparsity = 0.0 if is_dense else None if run is None else run.sparsity
    if sparsity is None:
        return []
    method = DENSE if run is None else run.method
    points = []
    for row in one.perplexity:
        title = f"{Path(str(row.get('data'))).name}, blocks of {row.get('length')}"
        value = row.get("value")
        points.append(Point(measure=PERPLEXITY, title=title, method=method, sparsity=sparsity, value=value))
    return points + [_of_task(row, method, sparsity) for row in one.tasks]


def over_sparsity(points: Sequence[Point]) -> Section | None:
    """Return the curves of each measure over the sparsity."""
    drawings = []
    for number, key in enumerate(dict.fromkeys((point.measure, point.title) for point in points)):
        drawing = _curves([one for one in points if (one.measure, one.title) == key], f"curve-{number}")
        drawings += [drawing] if drawing else []
    notes = ("The sparsity is the share of the decoder layers' parameters that is removed.",)
    title = "Perplexity and tasks over sparsity" if any(one.measure != PERPLEXITY for one in points) else ""
    title = title or "Perplexity over sparsity"
    return Section(name="curves", title=title, notes=notes, drawings=tuple(drawings)) if drawings else None


def _curves(points: Sequence[Point], name: str) -> Drawing | None:
    """Return one measure over the sparsity, with a curve for each method; None if no value is a number."""
    drawn = dict.fromkeys((one.method, one.sparsity, one.value) for one in points if is_finite(one.value))
    curves: dict[str, list[tuple[float, float]]] = {}
    for method, sparsity, value in drawn:
        curves.setdefault(method, []).append((sparsity, value))
    dense = curves.pop(DENSE, [(0.0, None)])[0][1]
    if not drawn:
        return None
    lower = points[0].measure == PERPLEXITY
    title = f"{points[0].measure.capitalize() if lower else points[0].measure}: {points[0].title}"
    told = [f"The dense model has {dense:.4g}"] if dense is not None else []
    for method, values in curves.items():
        told.append(f"{method} has {', '.join(f'{value:.4g} at {at:.1%}' for at, value in sorted(values))}")
    axis = f"{points[0].measure} ({'lower' if lower else 'higher'} is better)"
    svg = svg_of(draw_over_sparsity(curves, dense, axis), name, title, f"Curves. {'. '.join(told)}.")
    rows = tuple(
        (one.method, f"{one.sparsity:.2%}", shown_number(one.value, "{:,.4f}")) for one in dict.fromkeys(points)
    )
    table = Table(caption=title, headings=("method", "sparsity", points[0].measure), rows=rows)
    return Drawing(title=title, svg=svg, table=table)


def comparison_section(comparisons: Sequence[Mapping[str, Any]]) -> Section | None:
    """Return the rows of each comparison as a table."""
    headings = ("method", "sparsity", "parameters", "data", PERPLEXITY, "loss", "gap", "seconds")
    forms = {"sparsity": "{:.2%}", "parameters": "{:,}", "loss": "{:.4f}", "seconds": "{:,.1f}"}
    tables = []
    for held in comparisons:
        cells = [[shown_number(row.get(one), forms.get(one, "{:,.3f}")) for one in headings] for row in _named(held)]
        caption = f"Methods on {Path(str(held.get('model'))).name}"
        tables.append(Table(caption=caption, headings=headings, rows=tuple(map(tuple, cells))))
        if tasks := [(str(row.get("model")), row) for row in rows_at(held, "tasks")]:
            tables.append(_table("Tasks", tasks, TASK_COLUMNS))
    notes = (
        "gap: how far the loss is above the dense model's, as a fraction of the same for slimllm at that sparsity.",
    )
    title = "Methods side by side"
    return Section(name="comparison", title=title, notes=notes, tables=tuple(tables)) if tables else None


def _named(held: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**row, "data": Path(str(row.get("data"))).name} for row in rows_at(held, "rows")]


def evaluation_section(evaluations: Sequence[MeasuredModel]) -> Section | None:
    """Return tables of the perplexities and tasks of every measured model."""
    texts = [(one.model, row) for one in evaluations for row in one.perplexity]
    tasks = [(one.model, row) for one in evaluations for row in one.tasks]
    tables = (
        _table("Text", texts, ("data", "length", "value", "bits_per_byte", "kl", "agreement")),
        _table("Tasks", tasks, TASK_COLUMNS),
    )
    found = tuple(table for table in tables if table.rows)
    return Section(name="evaluation", title="Evaluation", tables=found) if found else None


def speed_section(speeds: Sequence[Mapping[str, Any]]) -> Section | None:
    """Return bars and a table of how many tokens per second each model takes in and writes."""
    rows = [(str(row.get("model")), row) for row in speeds]
    if not rows:
        return None
    names = ("prefill_tokens_per_second", "decode_tokens_per_second", "prefill_ratio", "decode_ratio")
    table = _table("Tokens per second", rows, ("batch_size", "prompt_length", *names))
    drawings = []
    for number, (key, what) in enumerate(zip(names[:2], ("reading a prompt", "writing text"), strict=True)):
        bars = [(_case(model, row), float(row[key])) for model, row in rows if is_finite(row.get(key))]
        if bars:
            title = f"Tokens per second, {what}"
            told = "; ".join(f"{name}: {value:,.1f}" for name, value in bars)
            svg = svg_of(draw_bars(bars, "tokens/s"), f"speed-{number}", title, f"Bars. {told}.")
            drawings.append(Drawing(title=title, svg=svg, table=table))
    return Section(name="speed", title="Speed", drawings=tuple(drawings), tables=() if drawings else (table,))


def _case(model: str, row: Mapping[str, Any]) -> str:
    return f"{Path(model).name}, batch {row.get('batch_size')}, prompt {row.get('prompt_length')}"


def _table(caption: str, rows: Sequence[tuple[str, Mapping[str, Any]]], columns: tuple[str, ...]) -> Table:
    """Return a table with a row for each model and mapping, and a column for each key."""
    headings = tuple(name.replace("_", " ") for name in ("model", *columns))
    # Each evaluation of several has the dense model.
    cells = dict.fromkeys((Path(model).name, *(_cell(row.get(name)) for name in columns)) for model, row in rows)
    return Table(caption=caption, headings=headings, rows=tuple(cells))


def _cell(value: Any) -> str:
    return shown_number(value, "{:,}" if isinstance(value, int) else "{:,.4f}")
