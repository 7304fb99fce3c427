"""The GPU's card runs whole on the CPU, where each quantity equals itself and no decision differs."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import MATHEMATICS
from tests.benchmarks.tables import require_positive, run_alone

SHAPE = ("--hidden=64", "--intermediate=176", "--layers=2", "--heads=8", "--kv-heads=4", "--blocks=1", "--device=cpu")


def test_the_card_runs_where_ray_is_not(shared: Path, tmp_path: Path) -> None:
    table = tmp_path / "gpu.md"
    model = shared / "models" / "stories260k-gqa"
    calibration = shared / "golden" / "tokens" / "stories260k.calibration.parquet"
    small = (f"--model={model}", f"--calibration={calibration}")
    rows = run_alone("benchmarks.gpu", table, *SHAPE, *small)
    column = "largest difference, or seconds"
    assert {name: rows[name][column] for name in MATHEMATICS} == dict.fromkeys(MATHEMATICS, "0")
    for method in ("slimllm", "gram"):
        differing, _, kept = rows[f"{method}: units that differ"][column].partition(" of ")
        assert differing == "0"
        assert int(kept) > 0
    for method in ("slimllm, 20 %", "gram, 20, 30 and 50 %"):
        require_positive(rows[f"{method}: whole run"], [column])


@pytest.mark.parametrize("name", MATHEMATICS)
def test_a_quantity_that_is_not_of_the_cpu_would_show(name: str) -> None:
    found = MATHEMATICS[name](torch.device("cpu"))
    assert found.isfinite().all()
    assert float(found.abs().max()) > 0
