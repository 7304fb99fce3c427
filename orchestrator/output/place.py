"""Finds the place of an output and of its staging directory, and refuses a staging directory that no run made.

An output that is a link stays one: the run works where the link leads. An output that is a mount point cannot be
renamed: its staging directory is inside it.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from orchestrator.config import ConfigError

# In the staging directory: working files, and the file that names the process that writes there.
WORK = ".work"
HOLDER = "holder"
# The system lists all mounts here. The fifth field of each line is the mount point, with octal escapes.
MOUNTS = Path("/proc/self/mountinfo")
# A new file system has this folder, which belongs to the system.
OF_THE_DISK = "lost+found"


def real_place(output: Path) -> Path:
    """Return an output's absolute path; if it is a link, the path that it leads to.

    Raises:
        ConfigError: It is the root of the file system, or a link that leads in a circle.
    """
    # A path such as "." has a name and a parent only once it is absolute.
    place = output.absolute()
    if place.is_symlink():
        try:
            place = place.resolve()
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"output {output} is a link that leads nowhere: choose another --output") from error
    if not place.name:
        raise ConfigError(f"output {output} is the root of the file system: choose another --output")
    return place


def is_mount(directory: Path) -> bool:
    """Return whether a directory is a mount point, also of the file system that it is in (a bind mount)."""
    if not directory.is_dir():
        return False
    if os.path.ismount(directory):
        return True
    with suppress(OSError, IndexError):
        lines = MOUNTS.read_bytes().splitlines()
        points = {re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split()[4]) for line in lines}
        return os.fsencode(directory.resolve()) in points
    return False


def staging_place(output: Path) -> Path:
    """Return the staging directory of an output: beside it, or inside it if it is a mount point.

    Raises:
        ConfigError: As for `real_place`.
    """
    place = real_place(output)
    return (place if is_mount(place) else place.parent) / f".{place.name}.partial"


def content_of(output: Path, staging: Path) -> list[Path]:
    """Return the entries of an output's directory, without what is there because it is a mount point."""
    entries = sorted(output.iterdir()) if output.is_dir() else []
    if staging.parent != output:
        return entries
    return [path for path in entries if path != staging and path.name != OF_THE_DISK]


def require_own(staging: Path, output: Path) -> None:
    """Refuse a staging directory that this user's runs cannot have left: its content would be deleted.

    Raises:
        ConfigError: It is a link, no directory, or another user's, or has content but no file that names a process.
    """
    for path in (staging, staging / WORK, staging / WORK / HOLDER):
        if wrong := _wrong_with(path, is_folder=path.name != HOLDER):
            raise _refusal(path, wrong, output)
    if staging.is_dir() and not (staging / WORK / HOLDER).exists():
        entries = [*staging.iterdir(), *((staging / WORK).iterdir() if (staging / WORK).exists() else ())]
        if any(path != staging / WORK for path in entries):
            raise _refusal(staging, "has content that no run left", output)


def _wrong_with(path: Path, *, is_folder: bool) -> str | None:
    try:
        found = path.lstat()
    except OSError:
        # Whether it can be made shows when it is made.
        return None
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not (stat.S_ISDIR(found.st_mode) if is_folder else stat.S_ISREG(found.st_mode)):
        return f"is no {'directory' if is_folder else 'file'}"
    if found.st_uid != os.geteuid():
        return f"belongs to another user ({found.st_uid})"
    return None


def _refusal(path: Path, wrong: str, output: Path) -> ConfigError:
    return ConfigError(
        f"output {output} would be made in {path}, which {wrong}: move or remove that, or choose another --output"
    )
