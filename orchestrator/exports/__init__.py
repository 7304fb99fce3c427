"""Exports a pruned checkpoint to formats that other programs load, one module per format."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Export:
    """The result of an export: its path, its architecture and a short description."""

    path: Path
    architecture: str
    description: str
