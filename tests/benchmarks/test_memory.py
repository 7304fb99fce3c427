from pathlib import Path

import pytest

from benchmarks.memory import NOTHING, main
from orchestrator.preflight.stages import LIBRARIES, SOLVE_LIBRARIES
from tests.benchmarks.tables import require_positive, run


@pytest.mark.usefixtures("whole_processes", "migrated_store")
def test_the_peak_of_every_process_is_sampled_and_libraries_take_what_estimates_say(tmp_path: Path) -> None:
    # The shape and the tokens of the run that tells what libraries take: one run is both.
    shape = ("64", "128", "2", "4", "2", "256")
    assert (NOTHING.hidden, NOTHING.intermediate, NOTHING.layers, NOTHING.vocabulary) == (64, 128, 2, 256)
    rows = run(main, tmp_path, "--shape", *shape, "--method=gram", "--blocks=4")
    assert list(rows) == ["64 x 2, gram, 8k"]
    row = rows["64 x 2, gram, 8k"]
    require_positive(row, ["worker, MB", "which may be", "solve, MB", "driver, MB"])
    assert row["above the libraries"] == ""
    # The model is next to nothing.
    assert float(row["worker, MB"]) == pytest.approx(LIBRARIES / 1e6, rel=0.1)
    assert float(row["solve, MB"]) == pytest.approx(SOLVE_LIBRARIES / 1e6, rel=0.1)
