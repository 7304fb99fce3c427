"""Whole runs in one process need neither Ray nor MLflow nor datasets, and every step of them is timed."""

import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.tables import read_table, require_positive
from tests.forked_workers.server import FORKED

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
for package in ("ray", "mlflow", "datasets"):
    sys.modules[package] = None
from benchmarks.one_process import main
main()
"""
SHAPE = ("--hidden=64", "--intermediate=176", "--layers=2", "--heads=8", "--kv-heads=4", "--blocks=1", "--device=cpu")
STEPS = {
    "slimllm, 20 %": ("similarities", "observing", "deciding heads", "deciding channels", "applying", "whole run"),
    "gram, 20, 30 and 50 %": ("sensitivities", "observing", "eliminating", "refitting", "whole run"),
}


def test_both_methods_run_where_ray_is_not_and_every_step_is_timed(tmp_path: Path) -> None:
    table = tmp_path / "one_process.md"
    command = [sys.executable, "-c", PROGRAM, *SHAPE, f"--output={table}"]
    done = subprocess.run(
        command, env=os.environ | FORKED, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_table(table)
    for method, steps in STEPS.items():
        names = {name for name in rows if name.startswith(method)}
        assert names == {f"{method}: {step}" for step in (*steps, "peak memory, GB")}
        require_positive(rows[f"{method}: whole run"], ["seconds"])
