import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks import faults
from benchmarks.faults import Attempt, draw_cases, kill_driver, main
from tests.benchmarks.tables import require_positive, run

# A process that starts another one, and solves a file every so often.
PROGRAM = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
solved = pathlib.Path(sys.argv[1])
solved.mkdir(parents=True)
for number in range(100):
    (solved / str(number)).write_text("")
    time.sleep(0.05)
"""


def test_cases_are_drawn_in_their_proportions() -> None:
    cases = draw_cases(50, 0, tuple(faults.KINDS), tuple(faults.METHODS))
    assert Counter(case.kind for case in cases) == faults.KINDS
    assert {case.method for case in cases} == set(faults.METHODS)
    assert cases == draw_cases(50, 0, tuple(faults.KINDS), tuple(faults.METHODS))
    assert cases != draw_cases(50, 1, tuple(faults.KINDS), tuple(faults.METHODS))


def test_a_driver_is_killed_at_its_moment_and_what_outlives_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "LEFT_SECONDS", 0.5)
    solved = tmp_path / ".out.partial" / ".work" / "solved"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(solved)], stdout=log, stderr=log)
    attempt = Attempt(process, tmp_path / "log", tmp_path / "out")
    assert attempt.reaches(3, 0.0)
    assert 3 <= attempt.solved_files() < 100
    (child,) = attempt.family()
    killed, problems = kill_driver(attempt, None)
    assert (killed, problems) == ("driver", ["1 processes lived on"])
    assert attempt.end()[0] == -9
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not attempt.reaches(1000, 0.0)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    start = time.monotonic()
    rows = run(main, tmp_path, "--cases=1", "--kind=worker", "--method=gram", "--layers=3")
    assert list(rows) == ["1"]
    row = rows["1"]
    assert (row["method"], row["differing files"], row["other problems"]) == ("gram", "none", "none")
    require_positive(row, ["seconds"])
    assert float(row["seconds"]) < time.monotonic() - start
    title = (tmp_path / "table.md").read_text().splitlines()[0]
    assert title == "# 1 of 1 disturbed runs end as the undisturbed one does (seed 0)"
