"""Writes files whole or not at all: to a temporary name, flushed to disk, then renamed. Also reads untrusted JSON."""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from slimllm_ops.errors import CheckpointError


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
    """Make an empty file, in the place of what an earlier process left there, and return its mode."""
    path.unlink(missing_ok=True)
    path.touch()
    return stat.S_IMODE(path.stat().st_mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's content."""
    with written_whole(path) as partial:
        shutil.copyfile(source, partial)


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


def read_json_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """Return the object in an untrusted JSON file.

    Args:
        path: The file.
        most_bytes: The largest size that is read, more than such a file can need.

    Raises:
        CheckpointError: The file is too large, cannot be read, or holds no JSON object.
    """
    try:
        if (size := path.stat().st_size) > most_bytes:
            raise CheckpointError(f"{path} has {size:,} bytes, more than such a file can need ({most_bytes:,})")
        held = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): make it readable") from error
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
