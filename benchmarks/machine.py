"""What every result file says of the machine it was measured on, and how its table is written."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import psutil


def describe_machine() -> str:
    """Return the processor, cores, memory and versions in a line."""
    memory = psutil.virtual_memory().total / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("slimllm", "torch", "transformers", "ray", "mlflow"))
    hardware = f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, no GPU"
    return f"{hardware}; Python {platform.python_version()}, {packages}"


def write_table(path: Path, title: str, machine: str, rows: Sequence[Sequence[str]]) -> None:
    """Write a Markdown file with a title, the machine and a table whose first row is its heading."""
    heading, *body = rows
    rule = ["---" if column == 0 else "---:" for column in range(len(heading))]
    lines = [f"| {' | '.join(row)} |" for row in (heading, rule, *body)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n{machine}.\n\n" + "\n".join(lines) + "\n")
    print(path.read_text())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
