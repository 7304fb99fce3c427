from pathlib import Path

import pytest

from benchmarks.stages import main
from tests.benchmarks.tables import require_positive, run


@pytest.mark.usefixtures("migrated_store", "whole_processes")
def test_a_run_is_timed_by_stage_and_its_memory_sampled(tmp_path: Path, mha_model: Path, token_file: Path) -> None:
    inputs = (str(mha_model), f"--calibration={token_file}", f"--evaluate={token_file}")
    rows = run(main, tmp_path, *inputs, "--row=gram, 20 %", "--no-warm-up", "--local")
    assert list(rows) == ["gram, 20 %"]
    row = rows["gram, 20 %"]
    assert {"inputs", "calibrating", "deciding", "read back"} <= set(row)
    require_positive(row, ["seconds", "largest process, MB", "all processes, MB"])
