"""Locks files, so that processes exclude each other."""

import fcntl
from typing import IO, Any


class UnlockableError(OSError):
    """A file that cannot be locked, as on a file system without locks."""


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file if no other process holds its lock; return whether this process holds it now.

    The system releases the lock when the file is closed or the process ends, however it ends.

    Raises:
        UnlockableError: The file system has no locks, or refuses this one.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UnlockableError(error.errno, error.strerror, file.name) from error
    return True
