from pathlib import Path

import pytest

from benchmarks.timeline import main
from tests.benchmarks.tables import numbers, run

SHAPE = ("--hidden=64", "--intermediate=176", "--layers=3", "--heads=8", "--kv-heads=4")


@pytest.mark.usefixtures("local_ray")
def test_every_layer_is_observed_before_it_is_solved(tmp_path: Path) -> None:
    rows = run(main, tmp_path, *SHAPE, "--blocks=4", "--block-length=64")
    assert list(rows) == ["0", "1", "2"]
    before = 0.0
    for row in rows.values():
        observed, attention, mlp = (numbers(row[name]) for name in list(row)[1:])
        # The table has hundredths, which a solve of this size need not take.
        assert before <= observed[0] + 0.01
        assert observed[0] < observed[1] <= mlp[0] + 0.01
        assert observed[0] <= attention[0] <= attention[1]
        assert mlp[0] <= mlp[1]
        before = observed[1]
    text = (tmp_path / "table.md").read_text()
    summary = next(line for line in text.splitlines() if line.endswith("of the solving overlapped observing."))
    assert all(number > 0 for number in numbers(summary)[:3])
    for name in ("observing", "solving"):
        bar = next(line for line in text.splitlines() if line.startswith(name)).split()[1]
        assert set(bar) - {"."} <= {"0", "1", "2"}
        assert len(bar) == 72
