"""Describes the machine of a measurement, and writes the table of a result file."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("slimllm-prune", "torch", "transformers", "ray", "mlflow")


def describe_machine() -> str:
    """Return the processor, cores, memory and versions in one line."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    hardware = f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {gpu}"
    return f"{hardware}; Python {platform.python_version()}, {packages}"


def write_table(path: Path, title: str, machine: str, rows: Sequence[Sequence[str]], after: str = "") -> None:
    """Write a Markdown file: title, machine, a table whose first row is the heading, and any text after it."""
    heading, *body = rows
    rule = ["---" if column == 0 else "---:" for column in range(len(heading))]
    lines = [f"| {' | '.join(row)} |" for row in (heading, rule, *body)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n{machine}.\n\n" + "\n".join([*lines, *(["", after] if after else [])]) + "\n")
    print(path.read_text())


def figure(value: float) -> str:
    """Format seconds or a ratio with two decimals, or below 0.1 with two significant digits."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
