"""Writes files whole or not at all: to a temporary name, flushed to disk, then renamed. Also reads untrusted files.

Whatever a model, a data set or an output holds is read by `open_plain` and what is built on it. A pipe would block, a
device has no end, and a file may be larger than memory.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from slimllm_ops.errors import CheckpointError

# What a path may lead to besides a plain file.
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotPlainError(OSError):
    """A path leads to something other than a plain file, or the file is larger than its kind can be."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a system error inside the block name this file, if it names none: only those of opening a file do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` at the end, or deleted after an error.

    Its mode is what the system gives new files here, by the umask or by the directory's default access list.

    Raises:
        OSError: The disk is full, or the directory cannot be written to; the error names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with naming(path):
            mode = _mode_of_new_file(partial)
            yield partial
        # safetensors makes files readable by their owner only. Some file systems take no modes at all.
        if stat.S_IMODE(partial.stat().st_mode) != mode:
            partial.chmod(mode)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise _system_error(error, path) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _mode_of_new_file(path: Path) -> int:
    """Make an empty file and return its mode; replace a file that an earlier process left."""
    path.unlink(missing_ok=True)
    path.touch()
    return stat.S_IMODE(path.stat().st_mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def copy_file(source: Path, path: Path) -> None:
    """Copy a plain file's content."""
    with open_plain(source) as content, written_whole(path) as partial, partial.open("wb") as copy:
        shutil.copyfileobj(content, copy)


def stays_inside(path: Path, directory: Path) -> bool:
    """Return whether a path leads into its directory, or to a file of a cache as the cache links it.

    The hub's cache has files in REPOSITORY/blobs, and links to them in REPOSITORY/snapshots/REVISION. That of
    orchestrator.sources.storage has one folder more below snapshots, with the name of the model.
    """
    place, home = path.resolve(), directory.resolve()
    blobs = [above.with_name("blobs") for above in home.parents[:2] if above.name == "snapshots"]
    return place.is_relative_to(home) or place.parent in blobs


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def require_plain(path: Path, most_bytes: int | None = None) -> None:
    """Check that a path leads to a plain file within a size limit, before a library opens it.

    Raises:
        NotPlainError: It leads to something else, or to a larger file.
        OSError: It leads nowhere.
    """
    _require_plain(path, path.stat(), most_bytes)


@contextmanager
def open_plain(path: Path) -> Iterator[io.BufferedReader]:
    """Open a plain file to read its bytes, without waiting for anything.

    Raises:
        NotPlainError: It is none.
        OSError: It cannot be opened.
    """
    require_plain(path)
    # What the path leads to may change until it is opened, and only then is it known. Opening a pipe would block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _require_plain(path, os.fstat(descriptor), None)
        yield file


def read_plain(path: Path, most_bytes: int) -> bytes:
    """Return the content of a plain file.

    Args:
        path: The file.
        most_bytes: The largest size that is read, more than such a file can need.

    Raises:
        NotPlainError: It is none, or it is larger.
        OSError: It cannot be read.
    """
    require_plain(path, most_bytes)
    with open_plain(path) as file:
        content = file.read(most_bytes + 1)
    # Some files have more than they say, as those that the system makes when they are read.
    if len(content) > most_bytes:
        raise _too_large(path, len(content), most_bytes)
    return content


def digest_files(directory: Path, names: Iterable[str]) -> str:
    """Return the SHA-256 of files of a directory, one after the other."""
    sha = hashlib.sha256()
    for name in names:
        with open_plain(directory / name) as file:
            while chunk := file.read(1 << 24):
                sha.update(chunk)
    return sha.hexdigest()


def _require_plain(path: Path, found: os.stat_result, most_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise NotPlainError(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}", str(path))
    if most_bytes is not None and found.st_size > most_bytes:
        raise _too_large(path, found.st_size, most_bytes)


def _too_large(path: Path, size: int, most_bytes: int) -> NotPlainError:
    said = f"it has {size:,} bytes, and such a file needs no more than {most_bytes:,}"
    return NotPlainError(errno.EINVAL, said, str(path))


def cannot_be_read(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the system, or `require_plain`, does not let us read."""
    remedy = "put the file itself in its place" if isinstance(error, NotPlainError) else "make it readable"
    return CheckpointError(f"{path} cannot be read ({error.strerror}): {remedy}")


def read_json_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """Return the object in an untrusted JSON file.

    Args:
        path: The file.
        most_bytes: The largest size that is read, more than such a file can need.

    Raises:
        CheckpointError: The file is too large, cannot be read, or holds no JSON object.
    """
    try:
        held = json.loads(read_plain(path, most_bytes).decode("utf-8"))
    except OSError as error:
        raise cannot_be_read(path, error) from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply: get a fresh copy") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): get a fresh copy") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} holds a {type(held).__name__}, expected a JSON object")
    return held


def flush(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: SafetensorError, path: Path) -> OSError:
    """Return the system error that safetensors reported as text."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else 0
    return OSError(number, os.strerror(number) if number else str(error), str(path))
