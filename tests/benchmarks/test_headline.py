from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import headline
from benchmarks.headline import CASES, main
from tests.benchmarks.tables import run


@pytest.fixture
def small(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the study one of a tiny model, and return the options that keep it in a folder of the test."""
    model = shared / "models" / "stories260k-gqa"
    sizes = {"length": 32, "calibration": 8, "held_out": 4}
    training = {"steps": 2, "batch_size": 2}
    case = replace(CASES[0], name="tiny", model=lambda: model, **sizes, training=training)
    monkeypatch.setattr(headline, "CASES", (case,))
    monkeypatch.setattr(headline, "METHODS", {name: headline.METHODS[name] for name in ("gram --refine",)})
    for name, value in (("TRAINING_LENGTH", 32), ("TRAINING_SEQUENCES", 12), ("PROMPT", 16), ("ROUNDS", 1)):
        monkeypatch.setattr(headline, name, value)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text((shared / "data" / "wikitext2" / name).read_text()[:4000])
    return [f"--texts={tmp_path}", f"--work={tmp_path / 'work'}", f"--figure={tmp_path / 'figure.png'}"]


def test_every_method_has_a_row_of_measured_figures_and_nothing_is_measured_twice(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(main, tmp_path, *small)
    lines = [
        line.strip("| ").split(" | ")
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| tiny")
    ]
    assert [(cells[2], cells[1]) for cells in lines[1:]] == [
        ("`gram --refine`", "20%"),
        ("`gram --refine`", "40%"),
    ]
    dense = float(lines[0][3])
    for cells in lines[1:]:
        assert float(cells[3]) > dense
        assert float(cells[4]) > 0
        assert float(cells[8]) < float(lines[0][8])
    assert (tmp_path / "figure.png").stat().st_size > 0
    first = (tmp_path / "table.md").read_text()
    for name in ("prune", "tune", "evaluate", "bench"):
        monkeypatch.delattr(headline, name)
    run(main, tmp_path, *small)
    assert (tmp_path / "table.md").read_text() == first
