"""Whole runs in one process need neither Ray nor MLflow nor datasets."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
for package in ("ray", "mlflow", "datasets"):
    sys.modules[package] = None
from benchmarks.one_process import main
main()
"""
SMALL = ("--hidden=64", "--intermediate=176", "--layers=3", "--heads=8", "--kv-heads=4", "--blocks=1", "--device=cpu")


def test_both_methods_run_where_ray_is_not(tmp_path: Path) -> None:
    table = tmp_path / "one_process.md"
    command = [sys.executable, "-c", PROGRAM, *SMALL, f"--output={table}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    stages = [line.split("|")[1].strip() for line in table.read_text().splitlines() if line.startswith("| ")]
    for stage in (
        "slimllm, 20 %: deciding channels",
        "gram, 20, 30 and 50 %: eliminating",
        "gram, 20, 30 and 50 %: whole run",
    ):
        assert stage in stages
