"""The lock of an output: at most one process writes it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.config import ConfigError


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
        with suppress(OSError):
            # What was just made is empty.
            holder.parent.rmdir()
            holder.parent.parent.rmdir()
        raise ConfigError(f"output {output} cannot be written: {error.strerror}; choose another --output") from error
    with file:
        try:
            # The system releases the lock when the process ends, even if it is killed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"output {output} is being written by another run ({file.read().strip()}): "
                f"wait for it, or choose another --output"
            ) from None
        if not holder.exists():
            raise ConfigError(f"output {output} was finished by another run just now: choose another --output")
        file.truncate(0)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        # If the disk is full, what the run needs there says so, with more words.
        with suppress(OSError):
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}, since {started}".encode())
        yield
