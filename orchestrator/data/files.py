"""Finds the file or folder that a spec names, and names its faults."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.data.blocks import DataError
from orchestrator.data.forms import SUFFIXES, described, form_of, saved_dataset
from orchestrator.sources import storage
from slimllm_ops.errors import shown
from slimllm_ops.files import require_plain

HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(?P<rest>(:(?P<config>[^:]+))?(:(?P<split>[^:]+))?)"
)
# Limit on the characters of a document: its tokenized form takes a hundred times as many bytes.
LONGEST_DOCUMENT = 1 << 25
# As many lines or documents without text may follow each other: a few compressed bytes can hold them without end.
MOST_EMPTY = 1 << 20
_MOST_NAMES = 10


def local_file(spec: str) -> Path | None:
    """Return the local file or saved dataset, or the copy of a URI's file; None for built-in texts and the hub."""
    if spec.startswith("builtin:"):
        return None
    return _fetched_file(spec) if storage.is_uri(spec) else _file_here(spec)


def _fetched_file(uri: str) -> Path:
    """Return the local copy of a file in a store."""
    try:
        _require_known_suffix(uri, Path(storage.name_of(uri)))
        path = storage.fetch_file(uri)
    except storage.StorageError as error:
        raise DataError(str(error)) from error
    _require_content(uri, path)
    return path


def _file_here(spec: str) -> Path | None:
    try:
        path = Path(spec).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    # Path.expanduser raises RuntimeError if "~name" is not a user's home.
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{shown(spec)}: not a readable path ({reason}): check it") from error
    if is_directory:
        return _saved_folder(spec, path)
    if not exists:
        if form_of(path) in SUFFIXES or not HUB_NAME.fullmatch(spec):
            raise DataError(f"{spec}: no such file: check the path, or use builtin:calibration, builtin:heldout")
        return None
    _require_known_suffix(spec, path)
    _require_content(spec, path)
    return path


def _saved_folder(spec: str, path: Path) -> Path:
    with naming_file(path, "a folder of save_to_disk"):
        folder = saved_dataset(path)
    if folder is None:
        raise DataError(f"{spec!r} is a directory: name one file in it ({', '.join(SUFFIXES)})")
    return folder


def _require_known_suffix(spec: str, path: Path) -> None:
    if form_of(path) not in SUFFIXES:
        raise DataError(f"{spec}: unknown file type {form_of(path)!r}: use {', '.join(SUFFIXES)}")


def _require_content(spec: str, path: Path) -> None:
    try:
        require_plain(path)
    except OSError as error:
        raise DataError(f"{spec} cannot be read: {error.strerror}; give a file") from error
    if path.stat().st_size == 0:
        raise DataError(f"{spec}: the file is empty: give one with text or token blocks")


@contextmanager
def naming_file(path: Path, kind: str | None = None) -> Iterator[None]:
    """Turn any error in reading a file into a one-line DataError that names the file, and what it should be."""
    try:
        yield
    except DataError:
        raise
    # Catch everything: for a broken file, pyarrow raises many kinds of errors.
    except Exception as error:
        raise DataError(
            f"{path}: not readable as {kind or described(path)} ({error_line(error)}): write it again"
        ) from error


def error_line(error: BaseException) -> str:
    """Return the type and the first line of a library's error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shown(lines[0], 200)}" if lines else type(error).__name__


def list_names(names: Iterable[str]) -> str:
    """Return the first few names, each cut to a readable length."""
    names = list(names)
    return ", ".join(map(shown, names[:_MOST_NAMES])) + (", ..." if len(names) > _MOST_NAMES else "")
