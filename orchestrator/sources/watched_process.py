"""Runs a module in a child process and kills it if it produces nothing for N seconds.

The child (`python -m MODULE`) reads its arguments from stdin, as a list in JSON: all users of the machine can see a
command line, and a URI may hold a password. It writes lines of JSON: {"given": a result} or {"failed": a reason}. An
empty line is a sign of life.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.secrets import masked

# Limit on a line: a row of a dataset is a document, and documents have their own limit.
MOST_BYTES = 1 << 28


class WatchedProcessError(RuntimeError):
    """A failure of the child process; the message says why."""


def ask(module: str, *arguments: str, stalled_seconds: float) -> Iterator[Any]:
    """Yield the results of a module's child process as they come; the process ends when the reader stops.

    Raises:
        WatchedProcessError: The process failed, ended early, or produced nothing for `stalled_seconds`.
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
    """Run a module in a child process while the block lasts; it imports nothing from the working directory."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdin is not None
        # If it has ended already, its exit code says so.
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(arguments).encode())
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: "subprocess.Popen[bytes]", stalled_seconds: float) -> Iterator[bytes]:
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    # The pieces of a line that has no end yet.
    begun: list[bytes] = []
    length = 0
    while True:
        if not select.select([descriptor], [], [], stalled_seconds)[0]:
            raise WatchedProcessError(f"nothing came for {stalled_seconds:g} s")
        if not (read := os.read(descriptor, 1 << 16)):
            return
        first, *others = read.split(b"\n")
        begun.append(first)
        length += len(first)
        if length > MOST_BYTES:
            raise WatchedProcessError(f"it sent a row of more than {MOST_BYTES:,} bytes")
        for after in others:
            yield b"".join(begun)
            begun, length = [after], len(after)


# ---- In the child process


def write(**said: object) -> None:
    """Write a result (`given`) or a reason (`failed`) as a line of JSON."""
    # A value that JSON cannot represent is not text: a list with its type's name replaces it.
    sys.stdout.write(json.dumps(said, default=lambda value: [type(value).__name__]) + "\n")
    sys.stdout.flush()


def give_sign_of_life() -> None:
    """Write an empty line, to show that something came."""
    os.write(sys.stdout.fileno(), b"\n")


def answer(do: Callable[..., None]) -> None:
    """Call a function with the arguments on stdin; if it fails, write why."""
    try:
        do(*json.load(sys.stdin))
    # Catch everything: these libraries have changed their HTTP library before, and with it the errors they raise.
    except Exception as error:
        write(failed=error_line(error))


def error_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message, short and without secrets."""
    # Mask before cutting: a cut secret is no longer recognised.
    reason = masked(next(iter(str(error).strip().splitlines()), ""))[:200]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
