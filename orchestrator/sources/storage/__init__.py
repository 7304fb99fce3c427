"""Reads and writes the stores that fsspec knows by URI: s3://, gs://, hf:// and others.

Models and data are fetched into a cache on this machine, and an output is uploaded when it is complete. Everything in
between works on local files. The stores' libraries run in a child process (process.py), which is killed if it produces
nothing for a while. This module imports none of them.

CACHE/fetched/DIGEST OF THE URI/
    lock                              held by the process that fetches
    blobs/TOKEN                       a complete file; the token identifies its version in the store
    snapshots/DIGEST OF TOKENS/NAME   the file or directory that the URI names: links to blobs, which never change
CACHE/outputs/DIGEST OF THE URI/NAME    an output before it is uploaded (output/destination.py)
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.secrets import masked
from orchestrator.sources import watched_process

STALLED_SECONDS = 60.0
# An upload gives no sign of life while it sends a part of a file (50 MB, or the whole file).
UPLOAD_STALLED_SECONDS = 600.0
_URI = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class StorageError(RuntimeError):
    """A failure to read or write a store; the message says what failed, why, and what to do."""


def is_uri(place: object) -> bool:
    """Return whether a place is a URI rather than a path."""
    return _URI.match(str(place)) is not None


@contextmanager
def naming_uri(place: str | None, copy: Path | None, *errors: type[Exception]) -> Iterator[None]:
    """Name the URI instead of its local copy in errors; leave errors about other places unchanged."""
    try:
        yield
    except errors as error:
        if place is None or copy is None or not is_uri(place):
            raise
        raise type(error)(str(error).replace(str(copy), masked(place))) from error


def name_of(uri: str) -> str:
    """Return the name that a URI ends with, without its query."""
    parts = urlsplit(uri)
    name = Path(parts.path).name or parts.netloc.rpartition("@")[2]
    if name in ("", ".", ".."):
        raise StorageError(f"{masked(uri)} names nothing: pass the URI of a directory or a file in it")
    return name


def cache_directory() -> Path:
    """Return the directory of local copies: `slimllm` in XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "slimllm"


def outgoing_directory(uri: str) -> Path:
    """Return the local directory where an output for a URI is built: the same one for every attempt."""
    return cache_directory() / "outputs" / _digest(uri) / name_of(uri)


def fetch_file(uri: str) -> Path:
    """Return a local copy of a file, and fetch it unless the store's version is already here.

    Raises:
        StorageError: There is no such file, or the store does not provide it.
    """
    return Path(_ask("fetch_file", uri, cache=_fetch_cache(uri), name=name_of(uri)))


def fetch_directory(uri: str, patterns: tuple[str, ...] = ("*",)) -> Path:
    """Return a local copy of a directory's files whose names match a pattern, and fetch only those not yet here.

    Raises:
        StorageError: There is no such directory, a name in it leads outside, or the store does not provide it.
    """
    return Path(_ask("fetch_directory", uri, cache=_fetch_cache(uri), name=name_of(uri), patterns=patterns))


def read_text(uri: str, name: str) -> str | None:
    """Return the text of a small file in a directory; None if there is no such file.

    Raises:
        StorageError: The store cannot be read.
    """
    return _ask("read_text", uri, name=name)


def require_writable(uri: str, overwrite: bool) -> None:
    """Refuse a directory that cannot be written to, or that is not empty and may not be overwritten.

    Raises:
        StorageError: The directory is refused.
    """
    _ask("require_writable", uri, overwrite=overwrite)


def upload_directory(uri: str, directory: Path, last: str, overwrite: bool) -> int:
    """Make a URI's directory identical to a local one; return how many files were there already and are not sent.

    `last`, the file that marks the directory complete, is uploaded at the end.

    Raises:
        StorageError: It holds other files and may not be overwritten, or the store rejects the upload.
    """
    asked = {"directory": str(directory), "last": last, "overwrite": overwrite}
    return int(_ask("upload_directory", uri, stalled_seconds=UPLOAD_STALLED_SECONDS, **asked))


def upload_file(uri: str, file: Path, name: str) -> None:
    """Upload a file into a URI's directory.

    Raises:
        StorageError: The store rejects the upload.
    """
    _ask("upload_file", uri, stalled_seconds=UPLOAD_STALLED_SECONDS, file=str(file), name=name)


def _ask(operation: str, uri: str, stalled_seconds: float | None = None, **asked: Any) -> Any:
    limit = stalled_seconds or STALLED_SECONDS
    try:
        (given,) = watched_process.ask(
            "orchestrator.sources.storage.process", operation, uri, json.dumps(asked), stalled_seconds=limit
        )
    except watched_process.WatchedProcessError as error:
        said = str(error)
        if uri not in said:
            said = f"{uri}: {said}: check the network and the store, and try again"
        raise StorageError(masked(said)) from error
    return given


def _fetch_cache(uri: str) -> str:
    return str(cache_directory() / "fetched" / _digest(uri))


def _digest(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:16]
