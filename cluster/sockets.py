"""Checks that the sockets of a local Ray fit where it puts its files; imports no Ray."""

import os
from pathlib import Path

from cluster.errors import ClusterError

# The system's limit for the path of a socket, in bytes.
LONGEST_PATH = 107
# The private folder of a Ray, with random letters, and Ray's own folder in it (local_ray.py).
PREFIX, SUBFOLDER = "ray-", "ray"
# What Ray adds: a session with its time and process, and the longest name of a socket.
LONGEST_SOCKET = f"{PREFIX}12345678/{SUBFOLDER}/session_2000-01-01_00-00-00_000000_{{pid}}/sockets/plasma_store"
# What names the folder for temporary files, in this order.
VARIABLES = ("RAY_TMPDIR", "TMPDIR")


def temporary_folder() -> str:
    """Return the folder in which a local Ray gets a folder of its own."""
    return next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "/tmp")


def require_room_for_sockets() -> None:
    """Check that the paths of Ray's sockets are short enough.

    Raises:
        ClusterError: They are not; the message says which variable to set.
    """
    name = next((name for name in VARIABLES if os.environ.get(name)), "TMPDIR")
    folder = temporary_folder()
    path = Path(folder) / LONGEST_SOCKET.format(pid=os.getpid())
    if (excess := len(os.fsencode(path)) - LONGEST_PATH) > 0:
        raise ClusterError(
            f"{name} is {folder}, where the paths of Ray's sockets would be {excess} bytes too long: set RAY_TMPDIR to "
            f"a folder with a shorter path, such as /tmp"
        )
