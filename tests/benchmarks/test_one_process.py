from pathlib import Path

from benchmarks.one_process import main
from tests.benchmarks.tables import require_positive, run

SHAPE = ("--hidden=64", "--intermediate=176", "--layers=2", "--heads=8", "--kv-heads=4", "--blocks=1", "--device=cpu")


def test_every_stage_of_both_methods_is_timed(tmp_path: Path) -> None:
    rows = run(main, tmp_path, *SHAPE)
    for method in ("slimllm, 20 %", "gram, 20, 30 and 50 %"):
        stages = [name for name in rows if name.startswith(method)]
        assert {f"{method}: {stage}" for stage in ("embedding", "observing", "writing", "in all")} <= set(stages)
        require_positive(rows[f"{method}: in all"], ["seconds"])
