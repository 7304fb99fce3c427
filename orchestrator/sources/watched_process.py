"""A module run in a process of its own, which is ended when nothing comes from it: what may wait without end, may not.

The process (`python -m MODULE ARGUMENTS`) writes lines of JSON: {"given": what was asked for} or {"failed": why}; an
empty line is a sign of life.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class WatchedProcessError(RuntimeError):
    """The process did not give what was asked for; the message says why."""


def ask(module: str, *arguments: str, stalled_seconds: float) -> Iterator[Any]:
    """Yield what a module's process gives, as it gives it; the process ends with whoever reads.

    Raises:
        WatchedProcessError: it failed, ended early, or nothing came for so many seconds.
    """
    with _start(module, arguments) as process:
        for line in _lines(process, stalled_seconds):
            if not line:
                continue
            said = json.loads(line)
            if "failed" in said:
                raise WatchedProcessError(said["failed"])
            yield said["given"]
        if code := process.wait():
            raise WatchedProcessError(f"the process that reads from it ended with code {code}")


@contextmanager
def _start(module: str, arguments: tuple[str, ...]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a module in a process, and end it with this block; it imports nothing from the directory it is run in."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: "subprocess.Popen[bytes]", stalled_seconds: float) -> Iterator[bytes]:
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    while True:
        if not select.select([descriptor], [], [], stalled_seconds)[0]:
            raise WatchedProcessError(f"nothing came for {stalled_seconds:g} s")
        if not (read := os.read(descriptor, 1 << 16)):
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from lines


# ---- In the process


def write(**said: object) -> None:
    """Write what is given, or why it failed."""
    # What JSON has no word for is no text either.
    sys.stdout.write(json.dumps(said, default=lambda value: [type(value).__name__]) + "\n")
    sys.stdout.flush()


def give_sign_of_life() -> None:
    """Say that something came."""
    os.write(sys.stdout.fileno(), b"\n")


def answer(do: Callable[..., None], *arguments: str) -> None:
    """Do what was asked; write why where it fails."""
    try:
        do(*arguments)
    # Any: libraries that talk to servers have changed their HTTP library, and with it what reaches their callers.
    except Exception as error:
        write(failed=error_line(error))


def error_line(error: BaseException) -> str:
    """Return an error's type and the first line of its text."""
    reason = next(iter(str(error).strip().splitlines()), "")[:200]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
