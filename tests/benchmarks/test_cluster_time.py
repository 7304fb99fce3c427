from pathlib import Path

from benchmarks.cluster_time import main
from tests.benchmarks.tables import require_positive, run

SHAPE = ("--hidden=64", "--intermediate=176", "--layers=2", "--heads=8", "--kv-heads=4")
SECONDS = ("gram: observing", "slimllm: observing", "solving", "deciding", "gram, s", "slimllm, s")


def test_the_model_is_checked_here_and_told_of_clusters(tmp_path: Path) -> None:
    rows = run(main, tmp_path, *SHAPE, "--blocks=1")
    here, *clusters = rows
    assert here == "here: hidden 64, 2 layers, 1 x 2048 tokens, 1 worker"
    assert clusters == [f"{size} on {gpus} GPU(s), assumed" for size in ("7B", "70B") for gpus in (1, 8, 32)]
    measured = rows[here]["measured, s"].split(", ")
    assert [part.split()[0] for part in measured] == ["gram", "slimllm"]
    require_positive(rows[here], ["gram, s", "measured, s"])
    for name in clusters:
        require_positive(rows[name], SECONDS)
    alone, eight = (float(rows[f"70B on {gpus} GPU(s), assumed"]["gram: observing"]) for gpus in (1, 8))
    assert 7.9 < alone / eight < 8.1
