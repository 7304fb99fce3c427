from pathlib import Path

from benchmarks.one_process import main
from tests.benchmarks.tables import require_positive, run

SHAPE = ("--hidden=64", "--intermediate=176", "--layers=2", "--heads=8", "--kv-heads=4", "--blocks=1", "--device=cpu")
STEPS = {
    "slimllm, 20 %": ("similarities", "observing", "deciding heads", "deciding channels", "applying", "whole run"),
    "gram, 20, 30 and 50 %": ("observing", "eliminating", "refitting", "whole run"),
}


def test_every_step_of_both_methods_is_timed(tmp_path: Path) -> None:
    rows = run(main, tmp_path, *SHAPE)
    for method, steps in STEPS.items():
        names = {name for name in rows if name.startswith(method)}
        assert names == {f"{method}: {step}" for step in (*steps, "peak memory, GB")}
        require_positive(rows[f"{method}: whole run"], ["seconds"])
