"""Replaces files by what a stranger may put there, and limits the time that reading may take."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    # A path of a socket has few characters.
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def as_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_link_to_a_pipe(path: Path) -> None:
    pipe = path.with_name(f".{path.name}.pipe")
    os.mkfifo(pipe)
    path.symlink_to(pipe.name)


def as_directory(path: Path) -> None:
    path.mkdir()


def as_terabyte(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 40)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": as_pipe,
    "socket": as_socket,
    "device": as_link_to_a_device,
    "link to a pipe": as_link_to_a_pipe,
    "directory": as_directory,
    "terabyte": as_terabyte,
}


def replaced(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    NO_FILES[kind](path)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail if the block waits, as for a pipe that nobody writes to."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
