"""The start-up benchmark measures the time from the real command to its first layer."""

from pathlib import Path

import pytest

from benchmarks.startup import HERE, MARKS, Measured, start_run, summary


@pytest.mark.slow
def test_a_run_is_timed_until_its_first_layer_and_ends_there(tmp_path: Path) -> None:
    measured = Measured(HERE, tmp_path)
    seconds = start_run(measured, 0)
    assert set(seconds) == set(MARKS)
    assert max(seconds, key=seconds.__getitem__) == "first layer"
    assert 0 < seconds["imports"] < seconds["inputs"] < seconds["workers hold their data"]
    # Ended as by Ctrl-C: nothing is left but the store of MLflow and the marks.
    assert not (tmp_path / "pruned-0").exists()
    for name, value in seconds.items():
        measured.add(name, value)
    assert summary(measured, "inputs") == f"{seconds['inputs']:.1f} / {seconds['inputs']:.1f}"
