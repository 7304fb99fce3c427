"""Reads and writes a run's journal: a file of events, each written before it is sent to a server."""

import json
import os
import time
from pathlib import Path
from typing import Any

from orchestrator.json_values import json_value
from orchestrator.tracking.options import StoredParent, TrackingError
from slimllm_ops.files import NotPlainError, naming, read_plain

# The largest journal that is read; the longest have some megabytes.
MOST_BYTES = 1 << 26


class Journal:
    """A run's events in a file, one JSON object per line; where runs share a file, `child` tells whose they are."""

    def __init__(self, path: Path, child: str | None = None) -> None:
        # Nothing is written here: a journal may be opened to be read, and may be another's.
        self.path, self.child = path, child
        self._begun = False

    def append(self, event: dict[str, object]) -> dict[str, Any]:
        """Write an event without the credentials of addresses, and return it as it reads from the file."""
        of_child = {} if self.child is None else {"child": self.child}
        line = json.dumps(json_value({"time": time.time(), **event, **of_child}), allow_nan=False)
        # The file is opened for each line: if the process is killed, all lines but the last are complete and in order.
        with naming(self.path):
            if not self._begun:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._cut_from_first_bad_line()
                self._begun = True
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
        return json.loads(line)

    def events(self) -> list[dict[str, Any]]:
        """Return the run's own events so far."""
        read = self.read(self.path) if self.path.exists() else []
        return [event for event in read if event.get("child") == self.child]

    def stored(self) -> StoredParent | None:
        """Return where the run is in MLflow; None if it is not there."""
        found = [event for event in self.events() if event["event"] == "stored"]
        if not found:
            return None
        return StoredParent(*(str(found[-1].get(name, "")) for name in ("uri", "experiment_id", "run_id")))

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return the events of a file up to the first line that is none, as a power cut leaves one.

        Raises:
            TrackingError: The file is no journal: it is no plain file, or too large, or its first line is neither an
                event nor what a power cut leaves.
        """
        return _whole_events(path, _content(path))[0]

    def _cut_from_first_bad_line(self) -> None:
        """Remove everything from the first bad line on, because nothing after that line is ever read.

        Nothing is lost: what no event tells is logged again when the run is resumed.
        """
        if self.path.exists():
            content = _content(self.path)
            if (size := _whole_events(self.path, content)[1]) < len(content):
                os.truncate(self.path, size)


def _content(path: Path) -> bytes:
    try:
        return read_plain(path, MOST_BYTES)
    except NotPlainError as error:
        raise TrackingError(f"{path} is no journal ({error.strerror}): move it away") from error


def _whole_events(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the events before the first line that is none, and the number of bytes that they take."""
    events: list[dict[str, Any]] = []
    size = 0
    for line in content.splitlines(keepends=True):
        if (event := _event_of(line)) is None:
            # A power cut leaves NULs instead of bytes that did not reach the disk, and may cut the last line short.
            if not events and b"\0" not in line and line.endswith(b"\n"):
                raise TrackingError(f"{path}, line 1: not an event of a run, so the file is no journal: move it away")
            break
        events.append(event)
        size += len(line)
    return events, size


def _event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event in a whole line; None if there is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and {"event", "time"} <= event.keys() else None
