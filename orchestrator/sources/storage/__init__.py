"""Models, data and outputs in the stores that fsspec knows, by URI: s3://, gs://, hf:// and others.

What is read is fetched into a cache on this machine, and an output is uploaded when it is whole; all between works on
local files. The stores' libraries run in a process of their own (process.py), which is ended when nothing comes from
it. This module imports none of them.

CACHE/fetched/DIGEST OF THE URI/
    lock                    whoever fetches holds it
    blobs/TOKEN             a file, whole; the token tells its version in the store
    DIGEST OF TOKENS/NAME   what the URI names: links to blobs, which never change
CACHE/outputs/DIGEST OF THE URI/NAME    an output that is on its way (output/destination.py)
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
# Of a file that is on its way there are no signs of life while a part of it (50 MB, or all of it) is sent.
UPLOAD_STALLED_SECONDS = 600.0
_URI = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class StorageError(RuntimeError):
    """A store did not give or take what was asked; the message says what, why, and what to do."""


def is_uri(place: object) -> bool:
    """Return whether a place is named by a URI rather than a path."""
    return _URI.match(str(place)) is not None


@contextmanager
def naming_uri(place: str | None, copy: Path | None, *errors: type[Exception]) -> Iterator[None]:
    """Let errors about a local copy name the URI that it was fetched from; errors about other places stay."""
    try:
        yield
    except errors as error:
        if place is None or copy is None or not is_uri(place):
            raise
        raise type(error)(str(error).replace(str(copy), place)) from error


def name_of(uri: str) -> str:
    """Return what the last part of a URI calls it; an address's query is no part of its name."""
    parts = urlsplit(uri)
    name = Path(parts.path).name or parts.netloc.rpartition("@")[2]
    if name in ("", ".", ".."):
        raise StorageError(f"{masked(uri)} names nothing: pass the URI of a directory or a file in it")
    return name


def cache_directory() -> Path:
    """Return where local copies are: `slimllm` in XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "slimllm"


def outgoing_directory(uri: str) -> Path:
    """Return the local directory in which an output is made that goes to a URI: the same for every attempt."""
    return cache_directory() / "outputs" / _digest(uri) / name_of(uri)


def fetch_file(uri: str) -> Path:
    """Return a local copy of a file, which is fetched unless its version in the store is here already.

    Raises:
        StorageError: there is no such file, or the store does not give it.
    """
    return Path(_ask("fetch_file", uri, cache=_fetch_cache(uri), name=name_of(uri)))


def fetch_directory(uri: str, patterns: tuple[str, ...] = ("*",)) -> Path:
    """Return a local copy of a directory's files whose names match a pattern; what is here already is not fetched.

    Raises:
        StorageError: there is no such directory, a name in it leaves it, or the store does not give it.
    """
    return Path(_ask("fetch_directory", uri, cache=_fetch_cache(uri), name=name_of(uri), patterns=patterns))


def read_text(uri: str, name: str) -> str | None:
    """Return the text of a small file of a directory; None if there is no such file.

    Raises:
        StorageError: the store does not say.
    """
    return _ask("read_text", uri, name=name)


def require_writable(uri: str, overwrite: bool) -> None:
    """Refuse a directory that holds something, unless that may be overwritten, or that cannot be written to.

    Raises:
        StorageError: it does, or it cannot.
    """
    _ask("require_writable", uri, overwrite=overwrite)


def upload_directory(uri: str, directory: Path, last: str, overwrite: bool) -> None:
    """Make a URI's directory the same as a local one; the file `last`, which says that it is whole, comes last.

    Raises:
        StorageError: it holds what is not of this directory and may not be overwritten, or the store does not take it.
    """
    asked = {"directory": str(directory), "last": last, "overwrite": overwrite}
    _ask("upload_directory", uri, stalled_seconds=UPLOAD_STALLED_SECONDS, **asked)


def upload_file(uri: str, file: Path, name: str) -> None:
    """Put a file into a URI's directory.

    Raises:
        StorageError: the store does not take it.
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
