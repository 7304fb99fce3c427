import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from orchestrator.record import figures
from orchestrator.record.figures import (
    LayerKept,
    ScoredUnits,
    draw_kept,
    draw_perplexity_over_sparsity,
    draw_scores,
)
from tests.forked_workers.server import FORKED


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    saved = []
    save = figures._save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)
    return saved


def kept_layers(n_layers, n_channels=64):
    return [
        LayerKept(
            layer=layer,
            heads_kept=1 + layer % 8,
            heads_total=8,
            channels_kept=n_channels - layer % 3,
            channels_total=n_channels,
        )
        for layer in range(n_layers)
    ]


def scored_layers(n_layers, n_units, n_kept):
    random = np.random.default_rng(0)
    scores = [random.gamma(4.0, size=n_units) for _ in range(n_layers)]
    return [
        ScoredUnits(layer=number, scores=layer, kept=sorted(np.argsort(-layer)[:n_kept].tolist()))
        for number, layer in enumerate(scores)
    ]


def size_of(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def points_of(axes):
    """The drawn points by label, as arrays of (x, y)."""
    return {dots.get_label(): np.asarray(dots.get_offsets()) for dots in axes.collections}


@pytest.mark.parametrize("n_layers", [1, 5, 32, 80])
def test_kept_shows_each_layers_share_and_count(tmp_path, drawn, n_layers):
    layers = kept_layers(n_layers)
    draw_kept(layers, tmp_path / "figures" / "kept.png")
    heads, channels = drawn[0].axes
    removed, kept = heads.containers
    assert [bar.get_height() for bar in kept] == [layer.heads_kept / 8 for layer in layers]
    assert {bar.get_height() for bar in removed} == {1.0}
    assert [text.get_text() for text in channels.texts] == [str(layer.channels_kept) for layer in layers]
    share = sum(layer.heads_kept for layer in layers) / (8 * n_layers)
    assert f"({share:.1%})" in heads.get_title(loc="left")
    assert (channels.get_xlabel(), heads.get_ylabel()) == ("decoder layer", "kept, of 8 heads")
    width, height = size_of(tmp_path / "figures" / "kept.png")
    assert width >= height


def test_counts_do_not_overlap(tmp_path, drawn):
    draw_kept(kept_layers(80, n_channels=28672), tmp_path / "kept.png")
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    for axes in drawn[0].axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert not any(left.overlaps(right) for left, right in pairwise(boxes))
        labels = [label.get_window_extent(renderer) for label in axes.get_xticklabels() if label.get_visible()]
        assert not any(left.overlaps(right) for left, right in pairwise(labels))


def test_scores_are_sorted_and_tell_kept_from_removed(tmp_path, drawn):
    draw_scores({"heads": scored_layers(5, 8, 6), "channels": scored_layers(5, 64, 40)}, tmp_path / "scores.png")
    for axes, n_units, n_kept in zip(drawn[0].axes, (8, 64), (6, 40), strict=True):
        points = points_of(axes)
        assert (len(points["kept"]), len(points["removed"])) == (5 * n_kept, 5 * (n_units - n_kept))
        assert f"{5 * (n_units - n_kept)} of {5 * n_units} removed" in axes.get_title(loc="left")
        for layer in range(5):
            inside = np.concatenate([p[np.abs(p[:, 0] - layer) < 0.5] for p in points.values()])
            curve = inside[np.argsort(inside[:, 0]), 1]
            assert len(curve) == n_units
            assert curve[0] == 1.0
            assert (np.diff(curve) <= 0).all()
    kept, removed = (points_of(drawn[0].axes[0])[label] for label in ("kept", "removed"))
    assert kept[np.round(kept[:, 0]) == 2, 1].min() > removed[np.round(removed[:, 0]) == 2, 1].max()


def test_a_unit_that_stays_against_its_score_is_shown_so(tmp_path, drawn):
    draw_scores({"heads": [ScoredUnits(layer=3, scores=[2.0, 4.0, 1.0], kept=[1, 2])]}, tmp_path / "scores.png")
    points = points_of(drawn[0].axes[0])
    assert sorted(points["kept"][:, 1].tolist()) == [0.25, 1.0]
    assert points["removed"][:, 1].tolist() == [0.5]
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["3"]


def test_many_channels_are_thinned_and_keep_both_ends(tmp_path, drawn):
    layers = scored_layers(80, 11008, 8000)
    draw_scores({"channels": layers}, tmp_path / "scores.png")
    points = points_of(drawn[0].axes[0])
    assert sum(map(len, points.values())) <= 80 * figures.MAX_POINTS
    lowest = min(min(layer.scores) / max(layer.scores) for layer in layers)
    assert points["removed"][:, 1].min() == pytest.approx(lowest)
    assert "240,640 of 880,640 removed" in drawn[0].axes[0].get_title(loc="left")


@pytest.mark.parametrize(("scores", "scale"), [([1.0, 0.5, 0.2], "linear"), ([1.0, 0.1, 0.001], "log")])
def test_a_wide_span_is_logarithmic(tmp_path, drawn, scores, scale):
    draw_scores({"heads": [ScoredUnits(layer=0, scores=scores, kept=[0])]}, tmp_path / "scores.png")
    assert drawn[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize("scores", [[0.0, 0.0], [-1.0, 2.0], [5.0]])
def test_odd_scores_are_drawn(tmp_path, drawn, scores):
    draw_scores({"heads": [ScoredUnits(layer=0, scores=scores, kept=range(len(scores)))]}, tmp_path / "s.png")
    assert size_of(tmp_path / "s.png")[0] > 500
    points = points_of(drawn[0].axes[0])
    assert np.isfinite(points["kept"]).all()
    assert len(points["kept"]) == len(scores)


def test_perplexity_has_a_line_for_each_method_and_the_dense_one(tmp_path, drawn):
    curves = {"slimllm": [(0.5, 16.0), (0.2, 7.0)], "gram": [(0.2, 6.5), (0.5, float("inf"))], "none": []}
    draw_perplexity_over_sparsity(curves, 5.5, tmp_path / "perplexity.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["slimllm"] == [[0.2, 7.0], [0.5, 16.0]]
    assert lines["gram"] == [[0.2, 6.5]]
    assert [y for _, y in lines["dense (5.5)"]] == [5.5, 5.5]
    assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 4
    assert axes.get_yscale() == "linear"
    draw_perplexity_over_sparsity({"random": [(0.2, 300.0)]}, 5.5, tmp_path / "perplexity.png")
    assert drawn[1].axes[0].get_yscale() == "log"


def test_nothing_to_draw_is_an_error(tmp_path):
    for draw, nothing in ((draw_kept, []), (draw_scores, {}), (draw_scores, {"heads": []})):
        with pytest.raises(ValueError, match="to draw"):
            draw(nothing, tmp_path / "none.png")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_kept(kept_layers(5), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in (tmp_path / "a.png").read_bytes()


def test_importing_and_drawing_leave_pyplot_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from orchestrator.record import figures as f;"
        "assert 'matplotlib' not in sys.modules;"
        f"f.draw_perplexity_over_sparsity({{'a': [(0.1, 2.0)]}}, 1.0, Path({str(tmp_path / 'p.png')!r}));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | FORKED, check=True, timeout=60)


def test_no_two_of_many_methods_are_drawn_alike(drawn, tmp_path):
    curves = {f"method {number}": [(0.2, 5.0 + number), (0.4, 9.0 + number)] for number in range(9)}
    draw_perplexity_over_sparsity(curves, 4.0, tmp_path / "perplexity.png")
    lines = drawn[0].axes[0].get_lines()
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(styles) == len(lines) == 10
