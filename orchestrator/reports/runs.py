"""Makes the sections about one run: what it removed, its errors, its seconds, its trainings, its settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.reports.figures import UnitRow, draw_bars, draw_errors, draw_map
from orchestrator.reports.parts import (
    UNKNOWN,
    Drawing,
    Section,
    Table,
    is_finite,
    listed,
    shown_number,
    shown_setting,
)
from orchestrator.reports.sources import decisions_of
from orchestrator.reports.svg import svg_of
from orchestrator.reports.values import ReportedRun, mapping_at
from slimllm_ops.decide.plan import LayerPlan

# A module and what its units are; a key/value head goes with the query heads that read it.
UNITS = {"attention": "key/value heads", "mlp": "channels"}
MODULES = {"attention": "attention", "mlp": "MLP"}


def sections_of(run: ReportedRun, name: str) -> list[Section]:
    """Return the sections about a run; the ids in them begin with a name."""
    sections = [_what_was_pruned(run, name), _errors(run, name), _seconds(run, name), _trainings(run, name)]
    return [section for section in sections if section is not None]


def _what_was_pruned(run: ReportedRun, name: str) -> Section | None:
    """Return maps of the units that each layer kept."""
    drawings = []
    for module, units in UNITS.items():
        rows = unit_rows(run.layers, module)
        if rows:
            title = f"{units.capitalize()} that each layer kept"
            svg = svg_of(draw_map(rows), f"{name}-{module}", title, _describe_rows(rows, units))
            drawings.append(Drawing(title=title, svg=svg, table=_table_of_rows(rows, units)))
    if not drawings:
        return None
    dropped = [str(number) for number, layer in enumerate(run.layers) if layer.dropped]
    notes = ["Blue cells stay, grey cells are removed. A pale blue cell has several units, and some of them stay."]
    notes += ["A key/value head goes with the query heads that read it."] if len(drawings) == len(UNITS) else []
    notes += [f"These layers are removed whole: {listed(dropped)}."] if dropped else []
    return Section(name=f"{name}-kept", title="What was pruned", notes=tuple(notes), drawings=tuple(drawings))


def unit_rows(layers: Sequence[LayerPlan], module: str) -> list[UnitRow]:
    """Return the kept units of each layer; a layer whose module is not pruned counts like its neighbours."""
    totals = [one.num_units for layer in layers for kind, one in decisions_of(layer) if kind == module]
    if not totals:
        return []
    rows, total = [], totals[0]
    for number, layer in enumerate(layers):
        decision = dict(decisions_of(layer)).get(module)
        total = total if decision is None else decision.num_units
        kept = tuple(range(total)) if decision is None else decision.kept
        rows.append(UnitRow(number, () if layer.dropped else kept, total))
    return rows


def _describe_rows(rows: Sequence[UnitRow], units: str) -> str:
    kept, total = sum(len(row.kept) for row in rows), sum(row.total for row in rows)
    fewest = min(rows, key=lambda row: len(row.kept) / max(row.total, 1))
    return (
        f"A map with a row for each of {len(rows)} layers. {kept:,} of {total:,} {units} are kept. Layer "
        f"{fewest.layer} keeps the smallest share: {len(fewest.kept):,} of {fewest.total:,}."
    )


def _table_of_rows(rows: Sequence[UnitRow], units: str) -> Table:
    cells = tuple(
        (str(row.layer), f"{len(row.kept):,}", f"{row.total:,}", f"{len(row.kept) / max(row.total, 1):.1%}")
        for row in rows
    )
    return Table(caption=f"{units.capitalize()} by layer", headings=("layer", "kept", "of", "share"), rows=cells)


def _errors(run: ReportedRun, name: str) -> Section | None:
    """Return the curves of each module's error over the layers."""
    errors: dict[str, list[tuple[int, float]]] = {}
    pruned = {module for layer in run.layers for module, _ in decisions_of(layer)}
    for number, layer in enumerate(run.layers):
        for module in (one for one in MODULES if one in pruned and not layer.dropped):
            decision = dict(decisions_of(layer)).get(module)
            error = 0.0 if decision is None else decision.relative_error
            if is_finite(error):
                errors.setdefault(MODULES[module], []).append((number, error))
    if not errors:
        return None
    title = "Relative error of each module"
    highest = {module: max(points, key=lambda point: point[1]) for module, points in errors.items()}
    described = [f"{module}: highest in layer {at}, {value:.3g}" for module, (at, value) in highest.items()]
    svg = svg_of(draw_errors(errors), f"{name}-error", title, f"Curves over the layers. {'. '.join(described)}.")
    by_module = [dict(points) for points in errors.values()]
    numbers = sorted({number for points in by_module for number in points})
    rows = tuple((str(n), *(shown_number(points.get(n), "{:.4g}") for points in by_module)) for n in numbers)
    table = Table(caption="Relative error by layer", headings=("layer", *errors), rows=rows)
    notes = ("The error of a module's output on the calibration text, relative to that output.",)
    drawing = Drawing(title=title, svg=svg, table=table)
    return Section(name=f"{name}-errors", title="Errors by module", notes=notes, drawings=(drawing,))


def _seconds(run: ReportedRun, name: str) -> Section | None:
    """Return the bars of the seconds that each stage took."""
    stages = [(stage, seconds) for stage, seconds in run.seconds.items() if is_finite(seconds)]
    if not stages:
        return None
    title, total = "Seconds of each stage", sum(seconds for _, seconds in stages)
    slowest, most = max(stages, key=lambda one: one[1])
    described = f"Bars. All stages take {total:,.1f} s; {slowest} takes the most, {most:,.1f} s."
    svg = svg_of(draw_bars(stages, "s"), f"{name}-seconds", title, described)
    rows = tuple((stage, f"{seconds:,.2f}", f"{seconds / (total or 1):.1%}") for stage, seconds in stages)
    table = Table(caption="Seconds by stage", headings=("stage", "seconds", "share"), rows=rows)
    drawing = Drawing(title=title, svg=svg, table=table)
    return Section(name=f"{name}-time", title="Seconds by stage", drawings=(drawing,))


def _trainings(run: ReportedRun, name: str) -> Section | None:
    """Return a table with a row for each training after the pruning."""
    rows = tuple(_training(one) for one in run.trainings)
    headings = ("method", "steps", "loss before", "loss after", "loss of the dense model", "came back")
    table = Table(caption="Held-out loss in nats per token", headings=headings, rows=rows)
    return Section(name=f"{name}-tuned", title="Training after the pruning", tables=(table,)) if rows else None


def _training(one: Mapping[str, Any]) -> tuple[str, ...]:
    params, totals = mapping_at(one, "params"), mapping_at(one, "totals")
    losses = (shown_number(totals.get(key), "{:.4f}") for key in ("loss_before", "loss_after", "loss_dense"))
    method, steps = str(params.get("method")), shown_number(totals.get("steps"), "{:,}")
    return (method, steps, *losses, shown_number(totals.get("recovered"), "{:.1%}"))


def settings_section(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Section:
    """Return a table of the settings and digests of each run, or comparison, with its label."""
    tables = tuple(
        Table(
            caption=label,
            headings=("setting", "value"),
            rows=tuple((name, shown_setting(value)) for name, value in params.items()) or ((UNKNOWN, UNKNOWN),),
            words=True,
        )
        for label, params in runs
    )
    notes = ("pruning/plan.json has every decision; pruning/run.toml repeats a run.",)
    return Section(name="settings", title="Settings and digests", notes=notes, folded=tables)
