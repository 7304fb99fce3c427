"""What talks to a store, in a process of its own: `python -m orchestrator.sources.storage.process OPERATION URI JSON`.

Files are opened by fsspec's filesystem of the URI's scheme, with the credentials and the endpoint that its library
finds in the environment.
"""

import fcntl
import hashlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from orchestrator.sources import watched_process

# The extras of this package that bring what a scheme needs.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# A connection that is dead is tried again before the process counts as stalled. Files travel side by side, not parts.
_S3 = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 15, "retries": {"max_attempts": 2}},
    "max_concurrency": 1,
}
OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}
# What stores call that by which they tell versions of a file apart.
VERSIONS = {
    *("etag", "md5hash", "crc32c", "contentmd5", "digest", "blobid", "xethash"),
    *("generation", "lastmodified", "updated", "mtime", "modified"),
}
MAX_TRANSFERS = 4
# Written and removed, to know before a run begins that its output can be written.
WRITE_TEST = ".slimllm"


class RefusedError(Exception):
    """What was asked cannot be done; the message names the URI."""


class Signs(Callback):
    """A sign of life for what is transferred, once a second at most."""

    last = 0.0

    def relative_update(self, inc: int = 1) -> None:
        """Note that bytes came."""
        if inc and time.monotonic() - self.last > 1:
            self.last = time.monotonic()
            watched_process.give_sign_of_life()


class Store:
    """A directory or file of a store: what the URI names."""

    def __init__(self, uri: str) -> None:
        self.uri, scheme = uri, uri.partition("://")[0].lower()
        if scheme not in fsspec.available_protocols():
            raise RefusedError(f"{uri}: no store is of type {scheme}: use s3://, gs://, hf:// or another of fsspec's")
        try:
            self.files, self.root = fsspec.url_to_fs(uri, **OPTIONS.get(scheme, {}))
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            remedy = f"pip install -e '.[{extra}]' in slimllm's checkout" if extra else str(error)
            raise RefusedError(f"{uri}: {scheme}:// needs a package that is not installed: {remedy}") from error
        self.root = self.root.rstrip("/")
        # What is imported takes seconds, which are not the store's.
        watched_process.give_sign_of_life()

    def find(self) -> dict[str, dict[str, Any]]:
        """Return what is said of every file under the root, by its name there; the root itself, a file, is ''."""
        self.files.invalidate_cache()
        found = self.files.find(self.root, detail=True)
        infos = {name: info for name, info in found.items() if info["type"] == "file"}
        named = {name.removeprefix(self.root).removeprefix("/"): info for name, info in infos.items()}
        return {name: info for name, info in named.items() if name != WRITE_TEST}

    def place(self, name: str) -> str:
        """Return where a file under the root is."""
        return f"{self.root}/{name}"

    def download(self, place: str, info: dict[str, Any], to: Path) -> None:
        """Bring a file here, where it is whole or is not."""
        partial = to.with_name(f"{to.name}.partial")
        try:
            self.files.get_file(place, str(partial), callback=Signs())
            size = partial.stat().st_size
            if info["size"] is not None and info["size"] != size:
                raise RefusedError(f"{self.uri}: {size:,} of {info['size']:,} bytes of {place} came: try again")
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(to)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def upload(self, file: Path, name: str) -> None:
        """Put a local file under the root."""
        self.files.put_file(str(file), self.place(name), callback=Signs())
        watched_process.give_sign_of_life()


# ---- Reading


def fetch_file(uri: str, *, cache: str, name: str) -> str:
    """Return where the local copy of a file is."""
    store = Store(uri)
    info = store.files.info(store.root)
    if info["type"] != "file":
        raise RefusedError(f"{uri} is a directory: name one file in it")
    return str(_fetch(store, {name: (store.root, info)}, Path(cache)) / name)


def fetch_directory(uri: str, *, cache: str, name: str, patterns: list[str]) -> str:
    """Return where the local copy of a directory is."""
    store = Store(uri)
    found = store.find()
    if "" in found:
        raise RefusedError(f"{uri} is a file: pass the directory that it is in")
    if not found:
        raise RefusedError(f"{uri}: there is nothing: check the URI")
    chosen = {each: info for each, info in found.items() if any(fnmatch(each, pattern) for pattern in patterns)}
    if not chosen:
        raise RefusedError(f"{uri}: none of its {len(found)} files is one of {', '.join(patterns)}: check the URI")
    for each in chosen:
        _require_inside(uri, each)
    named = {f"{name}/{each}": (store.place(each), info) for each, info in chosen.items()}
    return str(_fetch(store, named, Path(cache)) / name)


def read_text(uri: str, *, name: str) -> str | None:
    """Return the text of a small file."""
    store = Store(uri)
    try:
        return store.files.cat_file(store.place(name)).decode()
    except FileNotFoundError:
        return None


def _require_inside(uri: str, name: str) -> None:
    """Refuse names by which a file would be written elsewhere, or under another name than it has."""
    if PurePosixPath(name).as_posix() != name or name.startswith("/") or {"..", "."} & set(name.split("/")):
        raise RefusedError(f"{uri}: the name of {name!r} in it leaves the directory: rename or remove it there")


def _fetch(store: Store, wanted: dict[str, tuple[str, dict[str, Any]]], cache: Path) -> Path:
    """Return the directory that has the files by their local names, each a link to a blob; fetch what is not here.

    Args:
        store: where they come from.
        wanted: a file's place in the store and what is said of it, by its local name.
        cache: the URI's own directory.
    """
    tokens = {name: _token(place, info) for name, (place, info) in wanted.items()}
    directory = cache / _digest(sorted(tokens.items()))
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    with _lock(cache / "lock"):
        blobs = {name: cache / "blobs" / token for name, token in tokens.items()}
        missing = [name for name, blob in blobs.items() if not blob.exists()]
        _run_concurrently(lambda name: store.download(*wanted[name], to=blobs[name]), missing)
        for name, blob in blobs.items():
            link = directory / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(blob, link.parent))
    return directory


def _token(place: str, info: dict[str, Any]) -> str:
    """Return what tells a version of a file from others; where the store has no word for that, nothing is the same."""
    said = {key: str(value) for key, value in info.items() if _letters_of(key) in VERSIONS and value is not None}
    return _digest([place, info["size"], sorted(said.items()) or uuid.uuid4().hex])


def _letters_of(key: str) -> str:
    return "".join(filter(str.isalnum, key)).lower()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for whoever fetches the same; they end when nothing comes to them."""
    with path.open("w") as file:
        while True:
            with suppress(BlockingIOError):
                # The system lets go of it when the process ends, however it ends.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            watched_process.give_sign_of_life()
            time.sleep(0.5)
        yield


def _run_concurrently(do: Callable[[str], None], names: list[str]) -> None:
    """Do something of every name, a few at a time; the first error ends it."""
    with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
        futures = [pool.submit(do, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- Writing


def require_writable(uri: str, *, overwrite: bool) -> None:
    """Refuse what is taken, and what cannot be written to."""
    store = Store(uri)
    if found := store.find():
        _require_overwrite(uri, len(found), overwrite)
    store.files.pipe_file(store.place(WRITE_TEST), f"{socket.gethostname()} {time.time()}".encode())
    # Some may write and not delete; then it stays, and counts as nothing.
    with suppress(Exception):
        store.files.rm_file(store.place(WRITE_TEST))


def _require_overwrite(uri: str, num_files: int, overwrite: bool) -> None:
    if not overwrite:
        raise RefusedError(
            f"output {uri} is not empty ({num_files} files): choose another --output, or pass --overwrite to replace it"
        )


def upload_directory(uri: str, *, directory: str, last: str, overwrite: bool) -> None:
    """Upload a directory, remove what is not of it, and then say that it is whole."""
    store, source = Store(uri), Path(directory)
    files = {str(path.relative_to(source)): path for path in sorted(source.rglob("*")) if path.is_file()}
    there = store.find()
    stale = [name for name in there if name not in files]
    # What an earlier attempt at this upload left is its own, and so is the same output.
    if stale or (last in there and store.files.cat_file(store.place(last)) != files[last].read_bytes()):
        _require_overwrite(uri, len(there), overwrite)
    if last in there:
        # From here on what is there is not whole.
        store.files.rm_file(store.place(last))
    _run_concurrently(lambda name: store.upload(files[name], name), [name for name in files if name != last])
    for name in stale:
        store.files.rm_file(store.place(name) if name else store.root)
    _require_there(store, {name: path for name, path in files.items() if name != last})
    store.upload(files[last], last)
    _require_there(store, files)


def upload_file(uri: str, *, file: str, name: str) -> None:
    """Put one file into the directory."""
    Store(uri).upload(Path(file), name)


def _require_there(store: Store, files: dict[str, Path]) -> None:
    """Raise unless the store has the files, of their sizes, and no others."""
    sizes = {name: info["size"] for name, info in store.find().items()}
    for name, path in files.items():
        if sizes.get(name) != path.stat().st_size:
            raise RefusedError(f"{store.uri}: {name} has {sizes.get(name)} bytes there, {path.stat().st_size} here")


OPERATIONS = (fetch_file, fetch_directory, read_text, require_writable, upload_directory, upload_file)


def _run_operation(operation: str, uri: str, asked: str) -> None:
    operations: dict[str, Callable[..., Any]] = {each.__name__: each for each in OPERATIONS}
    try:
        watched_process.write(given=operations[operation](uri, **json.loads(asked)))
    except RefusedError as error:
        watched_process.write(failed=str(error))
    except FileNotFoundError as error:
        watched_process.write(
            failed=f"{uri}: there is nothing of this name ({watched_process.error_line(error)}): check the URI"
        )
    except Exception as error:
        why = watched_process.error_line(error)
        watched_process.write(
            failed=f"{uri}: the store refused ({why}): check the URI, the credentials and the network"
        )


if __name__ == "__main__":
    watched_process.answer(_run_operation, *sys.argv[1:])
