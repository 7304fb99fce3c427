"""A pruned checkpoint in the forms that other programs load, one module for each."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Export:
    """What an export wrote: where, of which architecture, and in a few words what that is."""

    path: Path
    architecture: str
    description: str
