from pathlib import Path

from benchmarks.speed import main
from tests.benchmarks.tables import require_positive, run


def test_every_step_is_timed(tmp_path: Path) -> None:
    rows = run(main, tmp_path, "--shape", "64", "176", "--tokens=256", "--heads=8")
    assert list(rows) == ["attention, hidden 64", "MLP, hidden 64, 176 channels", "elimination of 176 channels"]
    for name in list(rows)[:2]:
        require_positive(rows[name], ["published algorithm, s", "from sums, s", "ratio"])
    elimination = rows["elimination of 176 channels"]
    require_positive(elimination, ["from sums, s", "ratio"])
    assert elimination["ratio"].endswith("% of the GEMM rate")
