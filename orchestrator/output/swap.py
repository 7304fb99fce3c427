"""Puts a complete output into its place, so that the old one or the new one is there whatever happens.

Where the system can, it exchanges the two in one step (renameat2). If not, the old one is renamed and then the new one.
The old one goes to `.work/replaced` in the new one: no name that could be the user's.

An output that is a mount point is emptied and filled instead, its mark first and last: in between it is not complete,
and the next run continues.

`recover` completes or undoes what a crash cut short:

the output is absent, and the staging directory has the old one     the old one is renamed back
the staging directory is the old output                             it is deleted
the output has working files                                        they are deleted
a mount point is half filled                                        the rest is moved into it
"""

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from orchestrator.completion import MARK, is_marked
from orchestrator.output.lock import hold_lock
from orchestrator.output.place import HOLDER, WORK, content_of
from orchestrator.tracking.signals import defer_signals
from slimllm_ops.files import flush, write_json

# In the working files: the old output; which directory is the old one; that a mount point has been emptied.
REPLACED = "replaced"
REPLACES = "replaces.json"
FILLING = "filling.json"
# From the headers of Linux.
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def publish(staging: Path, output: Path) -> None:
    """Move a complete, marked staging directory to the output's place, and delete the old output.

    Raises:
        OSError: The system refuses; the old output is still in its place, or the next `recover` continues.
    """
    with defer_signals():
        if staging.parent == output:
            _fill(staging, output)
            return
        if not content_of(output, staging):
            # A directory may be renamed to an empty one.
            staging.rename(output)
        else:
            _swap(staging, output)
        flush(output.parent)
    _delete_working_files(output / WORK)


def recover(staging: Path, output: Path) -> None:
    """Complete or undo what a crash cut short; if nothing was, do nothing.

    Raises:
        ConfigError: The run that began it still lives.
        OSError: The system refuses to rename.
    """
    replaced = staging / WORK / REPLACED
    if staging.parent == output:
        if replaced.is_dir():
            with hold_lock(staging / WORK / HOLDER, str(output)):
                _fill(staging, output)
    elif replaced.is_dir() and not output.exists():
        with hold_lock(staging / WORK / HOLDER, str(output)):
            replaced.rename(output)
            flush(output.parent)
    elif is_marked(output) and (holder := output / WORK / HOLDER).is_file() and not (output / WORK).is_symlink():
        with hold_lock(holder, str(output)):
            if _is_replaced(staging, output):
                staging.rename(output / WORK / REPLACED)
            flush(output.parent)
            _delete_working_files(output / WORK)


def is_publishing(staging: Path) -> bool:
    """Return whether a staging directory holds an old output, which must not be lost with it."""
    return (staging / WORK / REPLACED).is_dir()


def empty(staging: Path) -> None:
    """Delete what is in a staging directory, except the file that shows that a run made it."""
    work = staging / WORK
    for path in (*staging.iterdir(), *work.iterdir()):
        if path not in (work, work / HOLDER):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def discard(staging: Path) -> None:
    """Delete a staging directory as far as possible, last the file that shows that a run made it."""
    try:
        empty(staging)
    except OSError:
        return
    shutil.rmtree(staging, ignore_errors=True)


def _delete_working_files(work: Path) -> None:
    """Delete working files as far as possible, last the one by which `recover` knows them."""
    with suppress(OSError):
        for path in work.iterdir():
            if path.name != HOLDER:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(work)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; return False, and change nothing, where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _swap(staging: Path, output: Path) -> None:
    found = output.stat()
    write_json(staging / WORK / REPLACES, [found.st_dev, found.st_ino])
    if exchange(staging, output):
        staging.rename(output / WORK / REPLACED)
        return
    aside = staging / WORK / REPLACED
    output.rename(aside)
    try:
        staging.rename(output)
    except BaseException:
        aside.rename(output)
        raise


def _is_replaced(staging: Path, output: Path) -> bool:
    """Return whether a staging directory is the output that the one in its place was exchanged for."""
    note = output / WORK / REPLACES
    if not note.is_file() or not staging.is_dir():
        return False
    found = staging.lstat()
    return note.read_text() == f"[{found.st_dev}, {found.st_ino}]\n"


def _fill(staging: Path, output: Path) -> None:
    """Move the entries of a mount point aside, then those of the staging directory into it, the mark last."""
    work = staging / WORK
    (work / REPLACED).mkdir(exist_ok=True)
    if not (work / FILLING).exists():
        for path in sorted(content_of(output, staging), key=lambda path: path.name != MARK):
            path.rename(work / REPLACED / path.name)
        flush(output)
        write_json(work / FILLING, True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == MARK):
        if path != work:
            path.rename(output / path.name)
    flush(output)
    # In this order: without the old entries there is nothing to continue.
    shutil.rmtree(work / REPLACED, ignore_errors=True)
    discard(staging)
