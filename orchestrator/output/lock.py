"""The lock of an output: at most one process writes it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from orchestrator.config import ConfigError
from orchestrator.locks import UnlockableError, try_lock
from orchestrator.sources.storage import is_uri


@contextmanager
def hold_lock(holder: Path, output: str) -> Iterator[None]:
    """Hold the lock of an output inside the block; the lock file names the process that holds it.

    Raises:
        ConfigError: Another run holds the lock, or the file cannot be written.
    """
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        file = holder.open("a+")
    except OSError as error:
        _remove_empty(holder)
        raise ConfigError(f"output {output} cannot be written: {error.strerror}; choose another --output") from error
    with file:
        if not _try_lock(file, holder, output):
            file.seek(0)
            raise ConfigError(
                f"output {output} is being written by another run ({file.read().strip()}): "
                f"wait for it, or choose another --output"
            )
        if not holder.exists():
            raise ConfigError(f"output {output} was finished by another run just now: choose another --output")
        file.truncate(0)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        # If the disk is full, what the run needs there says so, with more words.
        with suppress(OSError):
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}, since {started}".encode())
        yield


def _try_lock(file: TextIO, holder: Path, output: str) -> bool:
    try:
        return try_lock(file)
    except UnlockableError as error:
        _remove_empty(holder)
        remedy = "set XDG_CACHE_HOME to a folder" if is_uri(output) else "choose an --output"
        raise ConfigError(
            f"output {output} cannot be locked ({error.strerror}): the file system of {holder.parent} has no locks, "
            f"so two runs could write there at once; {remedy} on another file system"
        ) from error


def _remove_empty(holder: Path) -> None:
    """Remove what was just made: the lock file, if it names no process, and its folders."""
    with suppress(OSError):
        if holder.exists() and not holder.stat().st_size:
            holder.unlink()
        holder.parent.rmdir()
        holder.parent.parent.rmdir()
