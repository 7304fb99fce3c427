"""Measures the seconds from the start of `slimllm prune` until its first layer is done: `python -m benchmarks.startup`.

Each run is the real command in its own process, on the built-in model, with a local Ray and an MLflow store that an
earlier run made. It ends after the first layer. Stages overlap, so the table says when each was over, not how long it
took. Several checkouts (`--checkout`) take turns, so a busy machine slows all of them alike: compare the columns, not
tables of different days.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.machine import describe_machine, write_table

HERE = Path(__file__).resolve().parents[1]
MARKS = ("imports", "inputs", "Ray up", "MLflow run begun", "workers hold their data", "first layer")
# What a solve's process imports; the second name is that of older checkouts.
SOLVE = """
try:
    import slimllm_ops.module_solves
except ModuleNotFoundError:
    import slimllm_ops.one_pass
"""
COMMANDS = {
    "import slimllm_ops.module_solves": ("-c", SOLVE),
    "slimllm --help": ("-P", "-m", "orchestrator", "--help"),
}
LONGEST_RUN = 600.0


@dataclass(frozen=True)
class Measured:
    """A checkout, a folder for its runs, and the seconds of each measurement by its name."""

    checkout: Path
    folder: Path
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Add one measurement."""
        self.seconds.setdefault(name, []).append(seconds)


@click.command()
@click.option("--checkout", "checkouts", type=Path, multiple=True, help="Checkout to measure; repeatable. [this one]")
@click.option("--runs", default=5, show_default=True, help="Runs of each checkout, after one that does not count.")
@click.option("--output", type=Path, default=Path("benchmarks/results/startup.md"))
def main(checkouts: Sequence[Path], runs: int, output: Path) -> None:
    """Measure every checkout in turn, and write a table."""
    with tempfile.TemporaryDirectory() as folder:
        measured = []
        for number, checkout in enumerate(checkouts or (HERE,)):
            own = Path(folder) / str(number)
            own.mkdir()
            measured.append(Measured(checkout.resolve(), own))
        for run in range(runs + 1):
            for one in measured:
                seconds = {**start_run(one, run), **run_commands(one)}
                print(
                    f"run {run} of {one.checkout}: {', '.join(f'{k} {v:.1f}' for k, v in seconds.items())}", flush=True
                )
                for name, value in seconds.items() if run else ():
                    one.add(name, value)
    heading = ["seconds until, minimum / median", *(shown(one.checkout) for one in measured)]
    rows = [[name, *(summary(one, name) for one in measured)] for name in (*MARKS, *COMMANDS)]
    title = "Start-up: seconds from the start of `slimllm prune` on the built-in model"
    machine = f"{describe_machine()}, load average {os.getloadavg()[1]:.0f}; {runs} runs each, taking turns"
    write_table(output, title, machine, [heading, *rows])


def start_run(measured: Measured, run: int) -> dict[str, float]:
    """Run `slimllm prune` until its first layer is done; return when each stage was over."""
    marks = measured.folder / "marks.json"
    marks.unlink(missing_ok=True)
    options = ["prune", "--output", str(measured.folder / f"pruned-{run}")]
    options += ["--tracking-uri", f"sqlite:///{measured.folder / 'mlflow.db'}"]
    program = str(HERE / "benchmarks" / "startup_marks.py")
    done = run_python(measured, "-P", program, str(marks), str(time.time()), *options)
    if not marks.exists():
        raise click.ClickException(f"{measured.checkout}: no layer was reached: {done.stderr[-2000:]}")
    return json.loads(marks.read_text())


def run_commands(measured: Measured) -> dict[str, float]:
    """Return the seconds that each of COMMANDS takes."""
    seconds = {}
    for name, arguments in COMMANDS.items():
        start = time.perf_counter()
        run_python(measured, *arguments).check_returncode()
        seconds[name] = time.perf_counter() - start
    return seconds


def run_python(measured: Measured, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a checkout's Python, with the checkout's packages first, in the folder for its runs."""
    python = sys.executable if measured.checkout == HERE else measured.checkout / ".venv" / "bin" / "python"
    environment = {**os.environ, "PYTHONPATH": str(measured.checkout)}
    return subprocess.run(
        [str(python), *arguments],
        cwd=measured.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_RUN,
        check=False,
    )


def summary(measured: Measured, name: str) -> str:
    """Return the minimum and the median of a measurement."""
    seconds = measured.seconds.get(name)
    return f"{min(seconds):.1f} / {statistics.median(seconds):.1f}" if seconds else "-"


def shown(checkout: Path) -> str:
    """Return a checkout's name in the table: its commit."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or checkout.name


if __name__ == "__main__":
    main()
