"""Tells where the token for the user's clusters is, and who else can read it."""

import os
from pathlib import Path

# The bits of a file's mode by which a group and everyone read it, and those by which they pass its folders.
READERS = ((0o040, 0o010), (0o004, 0o001))


def token_file() -> Path | None:
    """Return the file that holds the token for the user's clusters; None if there is none, or if none is used."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return path if path.is_file() else None


def others_can_read(path: Path) -> bool:
    """Return whether a group or everyone can read a file, and can pass the folders that it is in."""
    real = path.resolve()
    mode = real.stat().st_mode
    return any(mode & read and all(folder.stat().st_mode & enter for folder in real.parents) for read, enter in READERS)
