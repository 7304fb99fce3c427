"""Checks that the sockets of a local Ray fit where it puts its files; imports no Ray."""

import os
from pathlib import Path

from cluster.errors import ClusterError

# The system's limit for the path of a socket, in bytes.
LONGEST_PATH = 107
# What Ray adds to the folder: a session with its time and process, and the longest name of a socket.
LONGEST_SOCKET = "ray/session_2000-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
# Where Ray looks for the folder, in this order.
VARIABLES = ("RAY_TMPDIR", "TMPDIR")


def require_room_for_sockets() -> None:
    """Check that the paths of Ray's sockets are short enough.

    Raises:
        ClusterError: They are not; the message says which variable to set.
    """
    name = next((name for name in VARIABLES if os.environ.get(name)), "TMPDIR")
    folder = os.environ.get(name) or "/tmp"
    path = Path(folder) / LONGEST_SOCKET.format(pid=os.getpid())
    if (excess := len(os.fsencode(path)) - LONGEST_PATH) > 0:
        raise ClusterError(
            f"{name} is {folder}, where the paths of Ray's sockets would be {excess} bytes too long: set RAY_TMPDIR to "
            f"a folder with a shorter path, such as /tmp"
        )
