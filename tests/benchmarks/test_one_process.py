"""Whole runs in one process need neither Ray nor MLflow nor datasets, and every step of them is timed."""

from pathlib import Path

from tests.benchmarks.tables import require_positive, run_alone

SHAPE = ("--hidden=64", "--intermediate=176", "--layers=2", "--heads=8", "--kv-heads=4", "--blocks=1", "--device=cpu")
STEPS = {
    "slimllm, 20 %": ("similarities", "observing", "deciding heads", "deciding channels", "applying", "whole run"),
    "gram, 20, 30 and 50 %": ("sensitivities", "observing", "eliminating", "refitting", "whole run"),
}


def test_both_methods_run_where_ray_is_not_and_every_step_is_timed(tmp_path: Path) -> None:
    table = tmp_path / "one_process.md"
    rows = run_alone("benchmarks.one_process", table, *SHAPE)
    for method, steps in STEPS.items():
        names = {name for name in rows if name.startswith(method)}
        assert names == {f"{method}: {step}" for step in (*steps, "peak memory, GB")}
        require_positive(rows[f"{method}: whole run"], ["seconds"])
