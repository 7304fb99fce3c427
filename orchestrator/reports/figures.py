"""Draws the figures of a report. Each is its own `matplotlib.figure.Figure`, small enough for a phone's width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.record.figures import BLUE, GREY, METHOD_COLOURS, METHOD_DASHES, METHOD_MARKERS, VERMILION
from orchestrator.reports.svg import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches and points: text stays legible if the figure is as wide as a phone.
WIDTH, FONT_SIZE, POINTS = 4.8, 10.5, 72
# The height of a plot of lines without its margins, and that of a line of its legend, in inches.
PLOT_HEIGHT, LEGEND_LINE = 2.2, 0.23
# A map has a cell for each unit, or for several next to each other.
MOST_CELLS = 64
# With more cells than this, there is no room for gaps between them.
MOST_WITH_GAPS = 32
# With more layers than this, rows are thin and have no counts.
MOST_TALL_ROWS = 40
# A cell of several units is drawn in as many shades.
SHADES = 4


@dataclass(frozen=True)
class UnitRow:
    """A layer's units: how many there were, and the indices of the kept ones."""

    layer: int
    kept: tuple[int, ...]
    total: int


def draw_map(rows: Sequence[UnitRow]) -> "Figure":
    """Draw a row for each layer with a cell for each unit, or for several: the darker, the more of them stay."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    tall = len(rows) <= MOST_TALL_ROWS
    counts = [f"{len(row.kept):,} of {row.total:,}" if tall else "" for row in rows]
    room = 0.12 + 0.08 * max(map(len, counts))
    figure, axes = _open((14 if tall else 6) * len(rows) / POINTS, right=room)
    widest = max(row.total for row in rows)
    rectangles: dict[int, list[tuple[float, float, float]]] = {shade: [] for shade in range(SHADES + 1)}
    for place, row in enumerate(rows):
        for shade, left, right in _cells(row):
            rectangles[shade].append((place, left / widest, right / widest))
    for shade, places in rectangles.items():
        corners = [_rectangle(place, left, right) for place, left, right in places]
        if corners:
            codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(corners))
            look = {"color": BLUE, "alpha": shade / SHADES} if shade else {"color": GREY}
            # Not add_patch: it looks at each corner to fit the axes, which are set below.
            axes.add_artist(PathPatch(Path(np.concatenate(corners), codes), linewidth=0, **look))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([])
    every = 1 if tall else 4
    axes.set_yticks(range(0, len(rows), every), [str(row.layer) for row in rows[::every]])
    axes.set_ylabel("decoder layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for place, count in enumerate(counts):
        axes.text(1.02, place, count, va="center", fontsize=FONT_SIZE - 1)
    return figure


def _cells(row: UnitRow) -> list[tuple[int, float, float]]:
    """Return a row's cells: the shade of each, from 0 (all removed) to SHADES (all kept), and its sides in units."""
    if not row.total:
        return []
    stays = np.zeros(row.total)
    stays[list(row.kept)] = 1
    edges = np.linspace(0, row.total, min(row.total, MOST_CELLS) + 1).round().astype(int)
    shares = np.add.reduceat(stays, edges[:-1]) / np.diff(edges)
    shades = np.ceil(shares * SHADES - 1e-9).astype(int)
    if len(shades) <= MOST_WITH_GAPS:
        sides = zip(shades.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        return [(shade, left + 0.06, right - 0.06) for shade, left, right in sides]
    # Cells of one shade next to each other are one rectangle.
    starts = np.flatnonzero(np.diff(shades, prepend=-1))
    ends = [*starts[1:].tolist(), len(shades)]
    return [(int(shades[a]), float(edges[a]), float(edges[b])) for a, b in zip(starts.tolist(), ends, strict=True)]


def _rectangle(place: float, left: float, right: float) -> np.ndarray:
    low, high = place - 0.4, place + 0.4
    return np.array([(left, low), (right, low), (right, high), (left, high), (left, low)])


def draw_errors(errors: Mapping[str, Sequence[tuple[int, float]]]) -> "Figure":
    """Draw the relative error of each module over the layers: a line for each kind of module."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _open_lines(len(errors))
    for number, (module, points) in enumerate(errors.items()):
        colour = (BLUE, VERMILION)[number % 2]
        axes.plot(*_columns(points), color=colour, marker="os"[number % 2], markersize=4, linewidth=1.5, label=module)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("relative error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish_lines(axes, len(errors))
    return figure


def draw_over_sparsity(
    curves: Mapping[str, Sequence[tuple[float, float]]], dense: float | None, measure: str
) -> "Figure":
    """Draw a measure over sparsity: a line for each method, which begins at the dense model, and a dashed one for that.

    Args:
        curves: Pairs of sparsity (0 to 1) and value by method; the values are finite.
        dense: The dense model's value; None if it is not known.
        measure: The label of the axis.
    """
    figure, axes = _open_lines(len(curves) + 1)
    values = [value for points in curves.values() for _, value in points]
    if dense is not None:
        axes.axhline(dense, color=MUTED, linestyle="--", linewidth=1.2, label=f"dense ({dense:.4g})")
        values.append(dense)
    for number, (method, points) in enumerate(curves.items()):
        dashes = METHOD_DASHES[number // len(METHOD_COLOURS) % len(METHOD_DASHES)]
        look: dict[str, Any] = {"color": METHOD_COLOURS[number % len(METHOD_COLOURS)], "linestyle": dashes}
        marker = METHOD_MARKERS[number % len(METHOD_MARKERS)]
        begun = sorted(points if dense is None else [(0.0, dense), *points])
        axes.plot(*_columns(begun), marker=marker, markersize=5, linewidth=1.6, label=method, **look)
    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_number)
        axes.yaxis.set_minor_formatter(_plain_number)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.set_xlabel("sparsity")
    axes.set_ylabel(measure)
    _finish_lines(axes, len(curves) + 1)
    return figure


def draw_bars(bars: Sequence[tuple[str, float]], unit: str) -> "Figure":
    """Draw a horizontal bar for each value, with its name and value above it."""
    figure, axes = _open(0.42 * len(bars), left=0.05, bottom=0.05)
    places = np.arange(len(bars))
    axes.barh(places, [value for _, value in bars], height=0.36, color=BLUE)
    for place, (name, value) in enumerate(bars):
        axes.text(0, place - 0.28, f"{name}: {value:,.1f} {unit}", va="bottom", ha="left", fontsize=FONT_SIZE)
    axes.set_xlim(0, max([value for _, value in bars] + [1e-9]))
    axes.set_ylim(len(bars) - 0.7, -0.85)
    axes.set_axis_off()
    return figure


def _open_lines(number: int) -> "tuple[Figure, Axes]":
    """Return a figure with room for lines, and for their names above."""
    return _open(PLOT_HEIGHT, left=0.78, bottom=0.52, top=0.1 + LEGEND_LINE * ((number + 1) // 2))


def _finish_lines(axes: "Axes", number: int) -> None:
    """Give axes of lines their grid, and a legend above, where no line runs through it."""
    axes.grid(color=GREY, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    columns, place = min(2, number), (-0.14, 1.01)
    axes.legend(
        loc="lower left", bbox_to_anchor=place, ncols=columns, frameon=False, borderaxespad=0, fontsize=FONT_SIZE
    )


def _columns(points: Sequence[tuple[float, float]]) -> np.ndarray:
    return np.array(points, dtype=float).reshape(-1, 2).T


def _plain_number(value: float, _: float) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "123468" else ""


def _open(
    height: float, left: float = 0.5, right: float = 0.12, bottom: float = 0.05, top: float = 0.05
) -> "tuple[Figure, Axes]":
    """Return a figure of a page's width, and its axes, with text of a legible size.

    The margins are fixed: to fit them to the text, matplotlib would draw everything twice.

    Args:
        height: The height of the axes, in inches like the margins.
        left: The margins around the axes.
        right: The same.
        bottom: The same.
        top: The same.
    """
    from matplotlib.figure import Figure

    whole = height + bottom + top
    figure = Figure(figsize=(WIDTH, whole))
    axes = figure.add_axes((left / WIDTH, bottom / whole, (WIDTH - left - right) / WIDTH, height / whole))
    axes.tick_params(labelsize=FONT_SIZE, color=INK)
    axes.xaxis.label.set_fontsize(FONT_SIZE)
    axes.yaxis.label.set_fontsize(FONT_SIZE)
    return figure, axes
