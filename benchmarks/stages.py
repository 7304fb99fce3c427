"""Measures seconds per stage and peak memory of whole runs on one model: `python -m benchmarks.stages MODEL`.

Each run is its own process, as a user starts it, and includes the start of Ray, its workers and MLflow. Memory is the
sampled private memory of the run's processes: the peak of the largest one, and the peak of their sum.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.machine import describe_machine, write_table
from benchmarks.sampling import Measured, run_slimllm

FIVE = [f"--sparsity={sparsity}" for sparsity in (0.1, 0.2, 0.3, 0.4, 0.5)]
ROWS = (
    "slimllm, 20 %, with perplexity",
    "gram, 20 %, with perplexity",
    "gram, 20 %",
    "gram, 10 to 50 %, five models",
    "gram --refine, 20 %",
    "calibrate",
    "prune --moments, 40 %",
)


@dataclass(frozen=True)
class Row:
    """What one command took, in total and by stage."""

    measured: Measured
    stages: dict[str, float]


@click.command()
@click.argument("model", type=Path)
@click.option("--calibration", required=True)
@click.option("--evaluate", required=True)
@click.option(
    "--row", "chosen", type=click.Choice(ROWS), multiple=True, default=ROWS, help="Only this row; repeatable."
)
@click.option("--local", is_flag=True, help="Run without Ray, in one process.")
@click.option("--warm-up/--no-warm-up", default=True, help="Whether to start with a run that is not measured.")
@click.option("--output", type=Path, default=Path("benchmarks/results/stages.md"))
def main(
    model: Path, calibration: str, evaluate: str, chosen: Sequence[str], local: bool, warm_up: bool, output: Path
) -> None:
    """Run every command once, in order, and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        backend = ["--local"] if local else []
        commands = _commands(model, [*backend, "--calibration", calibration], evaluate, Path(folder))
        # The first run with a new MLflow store spends seconds on creating it, which no row should count.
        if warm_up:
            _run(commands[ROWS[2]][0], Path(folder) / "warm-up")
        rows = {name: _run(*commands[name]) for name in ROWS if name in chosen}
    write_table(output, f"Stages of whole runs on {model.name}", describe_machine(), _table(rows))


def _commands(model: Path, common: list[str], evaluate: str, scratch: Path) -> dict[str, tuple[list[str], Path | None]]:
    """Return the arguments and the output of every row; the last row reads what the one before it writes."""
    store = f"--tracking-uri=sqlite:///{scratch}/mlflow.db"
    prune = ["prune", str(model), *common, store]
    gram = [*prune, "--method=gram"]
    moments = f"{scratch}/moments"
    return {
        ROWS[0]: ([*prune, "--evaluate", evaluate], scratch / "a"),
        ROWS[1]: ([*gram, "--evaluate", evaluate], scratch / "b"),
        ROWS[2]: (gram, scratch / "c"),
        ROWS[3]: ([*gram, *FIVE], scratch / "d"),
        ROWS[4]: ([*gram, "--refine"], scratch / "e"),
        ROWS[5]: (["calibrate", str(model), *common, f"--output={moments}"], None),
        # It starts no worker.
        ROWS[6]: (
            ["prune", str(model), "--method=gram", f"--moments={moments}", "--sparsity=.4", store],
            scratch / "f",
        ),
    }


def _run(arguments: list[str], output: Path | None) -> Row:
    """Run the command line; return what it took, in total and by stage."""
    measured = run_slimllm([*arguments, *([f"--output={output}"] if output else [])])
    return Row(measured, _seconds(next(output.rglob("metrics.jsonl"))) if output else {})


def _seconds(journal: Path) -> dict[str, float]:
    """Return the seconds of every stage, from the journal's metrics of the whole run."""
    totals = [json.loads(line).get("metrics", {}) for line in journal.read_text().splitlines()]
    prefix = "seconds/"
    return {
        name.removeprefix(prefix): value
        for metrics in totals
        for name, value in metrics.items()
        if name.startswith(prefix)
    }


def _table(rows: dict[str, Row]) -> list[list[str]]:
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row.stages))
    table = [["run", "seconds", *stages, "largest process, MB", "all processes, MB"]]
    for name, row in rows.items():
        cells = [f"{row.stages[stage]:.1f}" if stage in row.stages else "" for stage in stages]
        measured = row.measured
        memory = (f"{size / 1e6:.0f}" for size in (measured.largest, measured.together))
        table.append([name, f"{measured.seconds:.1f}", *cells, *memory])
    return table


if __name__ == "__main__":
    main()
