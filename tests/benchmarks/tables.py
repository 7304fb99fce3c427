"""Runs a benchmark's command in this process, and reads the table that it writes."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from tests.forked_workers.server import FORKED

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "mlflow", "datasets")
# A row: its cells by their heading.
Row = dict[str, str]


def run(command: click.Command, folder: Path, *arguments: str) -> dict[str, Row]:
    """Run a command and return its table's rows by their first cells."""
    output = folder / "table.md"
    try:
        command.main([*arguments, f"--output={output}"], standalone_mode=False)
    except SystemExit as ended:
        if ended.code:
            raise AssertionError(f"the benchmark ended with {ended.code}") from ended
    return read_table(output)


def run_alone(module: str, output: Path, *arguments: str) -> dict[str, Row]:
    """Run a benchmark in a process that cannot import Ray, MLflow or datasets; return its rows by their first cells."""
    program = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\nfrom {module} import main\nmain()"
    command = [sys.executable, "-c", program, *arguments, f"--output={output}"]
    done = subprocess.run(
        command, env=os.environ | FORKED, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return read_table(output)


def read_table(path: Path) -> dict[str, Row]:
    """Return the rows of a Markdown file's table by their first cells."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    heading, _, *rows = [[cell.strip() for cell in line[1:-1].split(" |")] for line in lines]
    assert all(len(row) == len(heading) for row in rows)
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rows}


def numbers(cell: str) -> list[float]:
    """Return the numbers in a cell, which may have units or words around them."""
    return [float(found) for found in re.findall(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?|nan|inf", cell.replace(",", ""))]


def require_positive(row: Row, columns: Sequence[str]) -> None:
    """Check that each cell has a number, and that all its numbers are finite and positive."""
    for column in columns:
        found = numbers(row[column])
        assert found, f"{column}: {row[column]!r} has no number"
        assert all(math.isfinite(number) and number > 0 for number in found), f"{column}: {row[column]!r}"
