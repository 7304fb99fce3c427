from pathlib import Path

from benchmarks.observing import main
from tests.benchmarks.tables import require_positive, run


def test_both_ways_of_observing_are_timed_beside_a_plain_pass(tmp_path: Path) -> None:
    shapes = ("--shape", "64", "176", "8", "--shape", "32", "48", "4")
    rows = run(main, tmp_path, *shapes, "--blocks=4", "--block-length=16", "--repeats=2", "--device=cpu")
    assert list(rows) == ["64, 176", "32, 48"]
    for row in rows.values():
        require_positive(row, ["plain, s", "gram, s", "slimllm, s", "gram, of plain", "slimllm, of plain"])
