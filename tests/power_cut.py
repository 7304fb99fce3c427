"""A power cut: from a rename or fsync on nothing changes on the disk, and what was not flushed is lost."""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.output import swap

# Changes of the disk, by the name of Python's audit event.
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR


class PowerCut(BaseException):
    """The end of the process; what would clean up after it raises the same."""


class Power:
    """Counts the renames and fsyncs below a folder, and cuts the power at one of them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._cut_at = str(folder), sys.maxsize
        self.moments = 0
        self._watching = False
        # What is on the disk: size and time of change of each file, by its number.
        self._flushed: dict[int, tuple[int, int]] = {}
        self._fsync, self._exchange = os.fsync, swap.exchange
        sys.addaudithook(self._hear)

    @contextmanager
    def cut_at(self, moment: int, *, exchanges: bool = True) -> Iterator[None]:
        """Cut the power at this rename or fsync, counted from now; without `exchanges`, the system has none."""
        self.moments, self._cut_at, self._watching = 0, moment, True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self._flush)
            patch.setattr(swap, "exchange", self._exchange_counted if exchanges else lambda one, other: False)
            try:
                yield
            finally:
                self._watching = False

    @property
    def is_cut(self) -> bool:
        """Whether the power is off."""
        return self.moments >= self._cut_at

    def lose_what_was_not_flushed(self, output: Path, seed: int) -> None:
        """Leave of each file that was not flushed what a disk may leave: nothing, or NULs."""
        chance = random.Random(seed)
        for path in sorted(output.parent.rglob("*")):
            if path.is_file() and output.name in str(path) and self._flushed.get(path.stat().st_ino) != _state(path):
                path.write_bytes(bytes(path.stat().st_size if chance.random() < 0.5 else 0))

    def take_as_flushed(self, output: Path) -> None:
        """Take all that is there now as on the disk."""
        self._flushed |= {path.stat().st_ino: _state(path) for path in output.rglob("*") if path.is_file()}

    def _count(self) -> None:
        self.moments += 1
        if self.is_cut:
            raise PowerCut

    def _flush(self, descriptor: int) -> None:
        place = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if self._watching and place.startswith(self._folder):
            self._count()
            self._flushed[os.fstat(descriptor).st_ino] = _state(Path(place))
        self._fsync(descriptor)

    def _exchange_counted(self, one: Path, other: Path) -> bool:
        self._count()
        return self._exchange(one, other)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching or (event not in EVENTS and event != "open"):
            return
        if not str(arguments[0]).startswith(self._folder) or (event == "open" and not arguments[2] & WRITING):
            return
        if event == "os.rename":
            self._count()
        elif self.is_cut:
            raise PowerCut


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
