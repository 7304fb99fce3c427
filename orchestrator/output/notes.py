"""Keeps named values in a JSON file, so that a resumed run has those of the run before it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.config import ConfigError
from slimllm_ops.errors import CheckpointError
from slimllm_ops.files import read_json_object, write_json

# The largest of these files that is read; a run writes some kilobytes.
MOST_BYTES = 1 << 24
T = TypeVar("T")


@dataclass(frozen=True)
class Notes:
    """Named values in a JSON file; each is computed once, even if the process is killed and the run resumed.

    Attributes:
        path: The file.
        replaceable: Whether the values may be computed again if the file is damaged.
    """

    path: Path
    replaceable: bool = False

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Return the stored value; if there is none, compute and store it."""
        noted = self._read()
        if name not in noted:
            noted[name] = compute()
            write_json(self.path, noted)
        return noted[name]

    def get(self, name: str) -> Any:
        """Return the stored value; None if there is none."""
        return self._read().get(name)

    def _read(self) -> dict[str, Any]:
        try:
            return read_settings(self.path) if self.path.exists() else {}
        except ConfigError:
            if self.replaceable:
                return {}
            raise


def read_settings(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run.

    Raises:
        ConfigError: The file is damaged, as a power cut may leave it.
    """
    try:
        return read_json_object(path, MOST_BYTES)
    except CheckpointError as error:
        raise ConfigError(f"{path} is damaged: pass --overwrite without --resume to start over") from error
