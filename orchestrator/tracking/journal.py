"""Reads and writes a run's journal: a file of events, each written before it is sent to a server."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.secrets import masked
from orchestrator.tracking.options import TrackingError


class Journal:
    """A run's events in a file, one JSON object per line; where runs share a file, `child` tells whose they are."""

    def __init__(self, path: Path, child: str | None = None) -> None:
        # Nothing is written here: a journal may be opened to be read, and may be another's.
        self.path, self.child = path, child

    def append(self, event: dict[str, object]) -> dict[str, Any]:
        """Write an event without secrets, and return it as it reads from the file."""
        of_child = {} if self.child is None else {"child": self.child}
        line = json.dumps(json_value({"time": time.time(), **event, **of_child}), allow_nan=False)
        # The file is opened for each line: if the process is killed, all lines but the last are complete and in order.
        with self.path.open("ab+") as file:
            _cut_unfinished_line(file)
            file.write(line.encode() + b"\n")
        return json.loads(line)

    def events(self) -> list[dict[str, Any]]:
        """Return the run's own events so far."""
        read = self.read(self.path) if self.path.exists() else []
        return [event for event in read if event.get("child") == self.child]

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return all events of a file; an unfinished last line is none.

        Raises:
            TrackingError: A line is not an event.
        """
        events = []
        content = path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                event = json.loads(line)
            except ValueError as error:
                raise TrackingError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(event, dict) or not {"event", "time"} <= event.keys():
                raise TrackingError(f"{path}, line {number}: not an event of a run")
            events.append(event)
        return events


def json_value(value: object) -> Any:
    """Return a value as JSON can hold it: NaN as null, infinity as "inf" or "-inf", unknown types as their text."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return masked(value)
        case float():
            return value if math.isfinite(value) else None if math.isnan(value) else str(float(value))
        case Mapping():
            return {masked(str(key)): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
        case _ if hasattr(value, "tolist"):
            return json_value(value.tolist())
        case _:
            return masked(str(value))


def _cut_unfinished_line(file: BinaryIO) -> None:
    """Remove the incomplete last line of a killed process, or the next line would be appended to it.

    Nothing is lost: an event counts as logged, and is sent to MLflow, only once its line is complete.
    """
    size = file.seek(0, os.SEEK_END)
    if not size or (file.seek(size - 1), file.read(1))[1] == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
