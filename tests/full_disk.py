"""A disk that is full from a moment on: what Python would open to write, or make, is refused."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Changes that need room, by the name of Python's audit event.
EVENTS = ("open", "os.mkdir", "os.rename")
WRITING = os.O_WRONLY | os.O_RDWR


class FullDisk:
    """Counts what is written below a folder, and refuses all of it from some moment on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._full_at = str(folder), sys.maxsize
        self.changes = 0
        self._counting = False
        sys.addaudithook(self._hear)

    @contextmanager
    def full_at(self, change: int) -> Iterator[None]:
        """Refuse this change, counted from now, and all that follow."""
        self.changes, self._full_at, self._counting = 0, change, True
        try:
            yield
        finally:
            self._counting = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._counting or event not in EVENTS or not str(arguments[0]).startswith(self._folder):
            return
        if event == "open" and not arguments[2] & WRITING:
            return
        self.changes += 1
        if self.changes >= self._full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
