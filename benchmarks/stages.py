"""Seconds per stage and peak memory of whole runs on one model: `python -m benchmarks.stages MODEL`.

Each run is a process of its own, as a user starts it, and includes starting Ray, its workers and MLflow. Memory is
the USS of the run's processes, sampled: the largest one's peak, and the peak of their sum.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil

from benchmarks.machine import describe_machine, write_table

SAMPLING_SECONDS = 0.2
FIVE = [f"--sparsity={sparsity}" for sparsity in (0.1, 0.2, 0.3, 0.4, 0.5)]


@dataclass
class Measured:
    """What one command took."""

    seconds: float
    largest: int
    together: int
    stages: dict[str, float] = field(default_factory=dict)


@click.command()
@click.argument("model", type=Path)
@click.option("--calibration", required=True)
@click.option("--evaluate", required=True)
@click.option("--output", type=Path, default=Path("benchmarks/results/stages.md"))
def main(model: Path, calibration: str, evaluate: str, output: Path) -> None:
    """Run every command once, in order, and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prune = ["prune", str(model), "--calibration", calibration, f"--tracking-uri=sqlite:///{scratch}/mlflow.db"]
        keep = ["calibrate", str(model), "--calibration", calibration, f"--output={scratch}/moments"]
        moments = ["prune", str(model), "--method=gram", f"--moments={scratch}/moments", *prune[-1:]]
        # The first run of a new MLflow store spends seconds on making it; none of the rows should.
        _run([*prune, "--method=gram"], scratch / "warm-up")
        rows = {
            "slimllm, 20 %, with perplexity": _run([*prune, "--evaluate", evaluate], scratch / "a"),
            "gram, 20 %, with perplexity": _run([*prune, "--method=gram", "--evaluate", evaluate], scratch / "b"),
            "gram, 20 %": _run([*prune, "--method=gram"], scratch / "c"),
            "gram, 10 to 50 %, five models": _run([*prune, "--method=gram", *FIVE], scratch / "d"),
            "gram --refine, 20 %": _run([*prune, "--method=gram", "--refine"], scratch / "e"),
            "calibrate": _run(keep, None),
            "prune --moments, 40 %": _run([*moments, "--sparsity=.4"], scratch / "f"),
        }
    write_table(output, f"Stages of whole runs on {model.name}", describe_machine(), _table(rows))


def _run(arguments: list[str], output: Path | None) -> Measured:
    """Run the command line, sampling its processes' memory."""
    command = [sys.executable, "-m", "orchestrator", *arguments, *([f"--output={output}"] if output else [])]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    measured = Measured(0.0, 0, 0)
    sampler = threading.Thread(target=_sample, args=(process, measured))
    sampler.start()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    measured.seconds = time.perf_counter() - start
    sampler.join()
    plan = next(output.rglob("plan.json"), None) if output else None
    if plan is not None:
        measured.stages = json.loads(plan.read_text())["totals"]["seconds"]
    return measured


def _sample(process: subprocess.Popen[bytes], measured: Measured) -> None:
    while process.poll() is None:
        sizes = [_uss(one) for one in _family(process.pid)]
        measured.largest = max([measured.largest, *sizes])
        measured.together = max(measured.together, sum(sizes))
        time.sleep(SAMPLING_SECONDS)


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _uss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _table(rows: dict[str, Measured]) -> list[list[str]]:
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row.stages))
    table = [["run", "seconds", *stages, "largest process, MB", "all processes, MB"]]
    for name, row in rows.items():
        cells = [f"{row.stages[stage]:.1f}" if stage in row.stages else "" for stage in stages]
        table.append([name, f"{row.seconds:.1f}", *cells, f"{row.largest / 1e6:.0f}", f"{row.together / 1e6:.0f}"])
    return table


if __name__ == "__main__":
    main()
