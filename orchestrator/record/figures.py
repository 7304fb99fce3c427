"""Draws a run's figures as PNG files: what was kept, how the units scored, and the cost in perplexity.

Each figure is its own `matplotlib.figure.Figure`, with no global state, so any thread can draw one and it does not
disturb a user's own plots. The colours are those of Okabe and Ito, which readers with any colour vision can tell
apart. The width grows with the number of layers, so that 5 to 80 layers stay legible.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.files import NotPlainError, cannot_be_read, require_plain, written_whole
from slimllm_ops.models.families import layer_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREY, BAND = "#0072B2", "#D55E00", "#D9DCE0", "#F5F6F8"
METHOD_COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
METHOD_MARKERS = "osD^vPX"
# When the colours run out, they repeat with other dashes.
METHOD_DASHES = ("-", ":", "--")
SLOT_WIDTH = 0.8
# With more layers than this, the counts in the bars are rotated to fit.
MAX_WIDE_SLOTS = 12
# More points than this cannot be told apart in a layer's slot.
MAX_POINTS = 400
# Scores whose highest-to-lowest ratio exceeds this are drawn on a logarithmic axis.
MAX_LINEAR_SPAN = 30.0


# What matplotlib reads from the working directory, which may be a stranger's model, when it is imported.
STYLE = Path("matplotlibrc")
LARGEST_STYLE = 1 << 20


def require_plain_style() -> None:
    """Check that matplotlib can be imported here without waiting for a pipe.

    Raises:
        CheckpointError: Its settings file is not a plain file.
    """
    with suppress(FileNotFoundError):
        try:
            require_plain(STYLE, LARGEST_STYLE)
        except NotPlainError as error:
            raise cannot_be_read(STYLE.absolute(), error) from error


@dataclass(frozen=True, kw_only=True)
class LayerKept:
    """How many of its heads and channels a layer kept."""

    layer: int
    heads_kept: int
    heads_total: int
    channels_kept: int
    channels_total: int

    @classmethod
    def of(cls, source: Checkpoint, layer: int, plan: LayerPlan) -> "LayerKept":
        """Count the heads and channels that a plan keeps in a layer."""
        shape = layer_shape(source.config, layer)
        group = shape.num_attention_heads // shape.num_key_value_heads
        return cls(
            layer=layer,
            heads_kept=0 if plan.dropped else _num_kept(plan.attention, shape.num_key_value_heads) * group,
            heads_total=shape.num_attention_heads,
            channels_kept=0 if plan.dropped else _num_kept(plan.mlp, shape.num_channels),
            channels_total=shape.num_channels,
        )


def _num_kept(decision: Decision | None, whole: int) -> int:
    return whole if decision is None else len(decision.kept)


@dataclass(frozen=True)
class ScoredUnits:
    """The importance of each unit of a layer (such as its heads), and the indices of the kept ones."""

    layer: int
    scores: Sequence[float]
    kept: Sequence[int]


def draw_kept(layers: Sequence[LayerKept], path: Path) -> None:
    """Draw the share of heads and channels that each layer kept, with the counts."""
    if not layers:
        raise ValueError("no layers to draw")
    figure = _figure(_width(len(layers)), 6.2)
    figure.suptitle("What each layer kept", fontsize=14, fontweight="bold")
    heads, channels = figure.subplots(2, 1, sharex=True)
    numbers = [layer.layer for layer in layers]
    _draw_shares(heads, numbers, [(layer.heads_kept, layer.heads_total) for layer in layers], "heads")
    _draw_shares(channels, numbers, [(layer.channels_kept, layer.channels_total) for layer in layers], "channels")
    _label_layers(channels, numbers)
    _save(figure, path)


def _draw_shares(axes: "Axes", numbers: Sequence[int], counts: Sequence[tuple[int, int]], unit: str) -> None:
    from matplotlib.ticker import PercentFormatter

    positions = np.arange(len(numbers))
    kept = np.array([kept for kept, _ in counts])
    shares = kept / np.array([total for _, total in counts])
    axes.bar(positions, 1.0, width=SLOT_WIDTH, color=GREY, label="removed")
    axes.bar(positions, shares, width=SLOT_WIDTH, color=BLUE, label="kept")
    narrow = len(numbers) > MAX_WIDE_SLOTS
    for position, share, count in zip(positions.tolist(), shares.tolist(), kept, strict=True):
        low = share < 0.25
        axes.text(
            position,
            share + (0.02 if low else -0.02),
            f"{count}",
            rotation=90 if narrow else 0,
            ha="center",
            va="bottom" if low else "top",
            fontsize=8 if narrow else 10,
            color="black" if low else "white",
        )
    totals = sorted({total for _, total in counts})
    of = f"{totals[0]}" if len(totals) == 1 else f"{totals[0]} to {totals[-1]}"
    all_kept, everything = sum(kept), sum(total for _, total in counts)
    title = f"{unit.capitalize()}: {all_kept:,} of {everything:,} kept ({all_kept / everything:.1%})"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(f"kept, of {of} {unit}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    _legend_above(axes)


def draw_scores(scores: Mapping[str, Sequence[ScoredUnits]], path: Path) -> None:
    """Draw the importance of each layer's units from highest to lowest, coloured by whether the unit was kept.

    It is relative to the layer's highest, so it cannot be compared between layers.

    Args:
        scores: The scored layers by kind of unit; each kind gets a panel.
        path: The PNG to write.
    """
    if not scores or not all(scores.values()):
        raise ValueError("no scores to draw")
    widest = max(len(layers) for layers in scores.values())
    figure = _figure(_width(widest), 0.8 + 3.2 * len(scores))
    figure.suptitle("Importance, highest to lowest in each layer", fontsize=14, fontweight="bold")
    panels = figure.subplots(len(scores), 1, squeeze=False)[:, 0]
    for axes, (unit, layers) in zip(panels, scores.items(), strict=True):
        _draw_sorted(axes, layers, unit)
    _save(figure, path)


def _draw_sorted(axes: "Axes", layers: Sequence[ScoredUnits], unit: str) -> None:
    positions, values, stays = (np.concatenate(parts) for parts in zip(*map(_curve, layers), strict=True))
    slots = np.repeat(np.arange(len(layers)), [len(_drawn_ranks(len(layer.scores))) for layer in layers])
    for slot in range(0, len(layers), 2):
        axes.axvspan(slot - 0.5, slot + 0.5, color=BAND, zorder=0, linewidth=0)
    # In points squared: neighbours touch where there is room, and no marker is too small to see.
    size = float(np.clip(72 * SLOT_WIDTH * _width(len(layers)) / len(values), 2.0, 5.5)) ** 2
    # The removed units are drawn last, on top: they are few, and readers look for them.
    for chosen, colour, label in ((stays, BLUE, "kept"), (~stays, VERMILION, "removed")):
        xs = slots[chosen] + SLOT_WIDTH * (positions[chosen] - 0.5)
        axes.scatter(xs, values[chosen], s=size, color=colour, label=label, linewidths=0)
    smallest = values.min()
    if smallest > 0 and 1 / smallest > MAX_LINEAR_SPAN:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, smallest * 1.05))
    dropped = sum(len(layer.scores) - len(layer.kept) for layer in layers)
    title = f"{unit.capitalize()}: {dropped:,} of {sum(len(layer.scores) for layer in layers):,} removed"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel("importance / layer's highest")
    axes.grid(axis="y", color=GREY, linewidth=0.6)
    axes.set_axisbelow(True)
    _label_layers(axes, [layer.layer for layer in layers])
    _legend_above(axes, markerscale=(30 / size) ** 0.5)


def _curve(layer: ScoredUnits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a layer's sorted curve: ranks from 0 to 1, scores relative to the highest, whether each unit is kept."""
    scores = np.asarray(layer.scores, dtype=float)
    stays = np.zeros(len(scores), dtype=bool)
    stays[np.asarray(layer.kept, dtype=int)] = True
    order = np.argsort(-scores, kind="stable")[_drawn_ranks(len(scores))]
    highest = np.abs(scores).max() or 1.0
    return (_drawn_ranks(len(scores)) + 0.5) / len(scores), scores[order] / highest, stays[order]


def _drawn_ranks(n_units: int) -> np.ndarray:
    """Return the ranks to draw: all of them, or at most MAX_POINTS at even distances."""
    return np.unique(np.linspace(0, n_units - 1, min(n_units, MAX_POINTS)).round().astype(int))


def draw_perplexity_over_sparsity(
    curves: Mapping[str, Sequence[tuple[float, float]]], dense: float, path: Path
) -> None:
    """Draw perplexity over sparsity: a line for each method, and the dense model's perplexity as the baseline.

    Args:
        curves: Pairs of sparsity (0 to 1) and perplexity by method; perplexities that are not finite are left out.
        dense: The dense model's perplexity.
        path: The PNG to write.
    """
    figure = _figure(8.0, 5.2)
    axes = figure.subplots()
    axes.axhline(dense, color="#555555", linestyle="--", linewidth=1.2, label=f"dense ({dense:.4g})")
    highest = dense
    for number, (method, pairs) in enumerate(curves.items()):
        points = np.array(sorted(pair for pair in pairs if np.isfinite(pair[1]))).reshape(-1, 2)
        colour = METHOD_COLOURS[number % len(METHOD_COLOURS)]
        marker = METHOD_MARKERS[number % len(METHOD_MARKERS)]
        dashes = METHOD_DASHES[number // len(METHOD_COLOURS) % len(METHOD_DASHES)]
        axes.plot(*points.T, color=colour, linestyle=dashes, marker=marker, markersize=6, linewidth=1.8, label=method)
        highest = max([highest, *points[:, 1]])
    if highest > 5 * dense:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_number)
        axes.yaxis.set_minor_formatter(_plain_number)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_xlabel("sparsity: share of the decoder layers' parameters that is removed")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("Perplexity over sparsity", fontsize=14, fontweight="bold", loc="left")
    axes.grid(color=GREY, linewidth=0.6, which="both")
    axes.set_axisbelow(True)
    # The legend is outside the axes: in any corner, some curve could run through it.
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _save(figure, path)


def _plain_number(value: float, _: float) -> str:
    # The default labels of a logarithmic axis with less than two decades look like "6 x 10^0".
    return f"{value:g}" if f"{value:e}"[0] in "123468" else ""


def _width(n_layers: int) -> float:
    """Return a width in inches: room for a line of rotated text per layer, within what a page can show."""
    return float(np.clip(1.6 + 0.3 * n_layers, 7.0, 26.0))


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label_layers(axes: "Axes", numbers: Sequence[int]) -> None:
    # Label every layer while there is room for two digits, else every second.
    every = 1 if len(numbers) <= 48 else 2
    axes.set_xticks(range(0, len(numbers), every), [str(number) for number in numbers[::every]])
    axes.set_xlim(-0.6, len(numbers) - 0.4)
    axes.set_xlabel("decoder layer")


def _legend_above(axes: "Axes", markerscale: float = 1.0) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, markerscale=markerscale)


def _save(figure: "Figure", path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Leave out matplotlib's version, so that the same run writes the same bytes.
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})
