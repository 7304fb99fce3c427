"""The journal of a run: a file of events, written before anything is told to a server."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.tracking.options import TrackingError


class Journal:
    """A file of events, one JSON object a line. Set `path` when the file has moved."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def append(self, event: dict[str, object]) -> dict[str, Any]:
        """Write an event and return it as a reader of the file will see it."""
        line = json.dumps(plain({"time": time.time(), **event}), allow_nan=False)
        # Opened for each line: nothing stays in a buffer, and the folder may be renamed between two lines.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return json.loads(line)

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The events of a journal; a last line cut short by a crash is left out."""
        lines = path.read_text(encoding="utf-8").splitlines()
        events = []
        for number, line in enumerate(lines, start=1):
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise TrackingError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not events:
            raise TrackingError(f"{path}: no events to log")
        return events


def plain(value: object) -> Any:
    """What JSON can hold: NaN becomes null, infinity "inf" or "-inf", what it does not know its text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None if math.isnan(value) else str(float(value))
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if hasattr(value, "tolist"):
            return plain(value.tolist())
        case _:
            return str(value)
