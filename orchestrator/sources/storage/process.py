"""Talks to a store in a child process, which gets an operation, a URI and the operation's arguments in JSON.

fsspec's filesystem for the URI's scheme opens the files, with the credentials and the endpoint that its library finds
in the environment.
"""

import hashlib
import json
import os
import socket
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

from orchestrator.locks import UnlockableError, try_lock
from orchestrator.sources import watched_process
from orchestrator.sources.storage.digests import is_same

# The extra of this package that installs the library of each scheme.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# A dead connection is retried before the process counts as stalled. Files are sent in parallel, parts of them are not.
_S3 = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 15, "retries": {"max_attempts": 2}},
    "max_concurrency": 1,
}
OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}
# The keys by which stores identify a file's version, reduced to lower-case letters and digits.
VERSIONS = {
    *("etag", "md5hash", "crc32c", "contentmd5", "digest", "blobid", "xethash"),
    *("generation", "lastmodified", "updated", "mtime", "modified"),
}
MAX_TRANSFERS = 4
# Written and removed before a run begins, to check that its output can be written.
WRITE_TEST = ".slimllm"


class RefusedError(Exception):
    """A request that cannot be fulfilled; the message names the URI."""


class Signs(Callback):
    """A callback that gives a sign of life during transfers, once a second at most."""

    last = 0.0

    def relative_update(self, inc: int = 1) -> None:
        """Note that bytes were transferred."""
        if inc and time.monotonic() - self.last > 1:
            self.last = time.monotonic()
            watched_process.give_sign_of_life()


class Store:
    """A directory or file in a store, named by a URI."""

    def __init__(self, uri: str) -> None:
        self.uri, scheme = uri, uri.partition("://")[0].lower()
        if scheme not in fsspec.available_protocols():
            raise RefusedError(f"{uri}: unknown store type {scheme}: use s3://, gs://, hf:// or another of fsspec's")
        try:
            self.files, self.root = fsspec.url_to_fs(uri, **OPTIONS.get(scheme, {}))
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            remedy = f"pip install -e '.[{extra}]' in slimllm's checkout" if extra else str(error)
            raise RefusedError(f"{uri}: {scheme}:// needs a package that is not installed: {remedy}") from error
        self.root = self.root.rstrip("/")
        # Imports take seconds, which must not count as the store's.
        watched_process.give_sign_of_life()

    def find(self) -> dict[str, dict[str, Any]]:
        """Return the store's details of each file under the root, by relative name; '' if the root is a file itself."""
        self.files.invalidate_cache()
        found = self.files.find(self.root, detail=True)
        infos = {name: info for name, info in found.items() if info["type"] == "file"}
        named = {name.removeprefix(self.root).removeprefix("/"): info for name, info in infos.items()}
        return {name: info for name, info in named.items() if name != WRITE_TEST}

    def place(self, name: str) -> str:
        """Return the location of a file under the root."""
        return f"{self.root}/{name}"

    def download(self, place: str, info: dict[str, Any], to: Path) -> None:
        """Download a file, completely or not at all."""
        partial = to.with_name(f"{to.name}.partial")
        try:
            self.files.get_file(place, str(partial), callback=Signs())
            size = partial.stat().st_size
            if info["size"] is not None and info["size"] != size:
                raise RefusedError(f"{self.uri}: got {size:,} of {info['size']:,} bytes of {place}: try again")
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(to)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def upload(self, file: Path, name: str) -> None:
        """Upload a local file under the root."""
        self.files.put_file(str(file), self.place(name), callback=Signs())
        watched_process.give_sign_of_life()


# ---- Reading


def fetch_file(uri: str, *, cache: str, name: str) -> str:
    """Return the path of a file's local copy."""
    store = Store(uri)
    info = store.files.info(store.root)
    if info["type"] != "file":
        raise RefusedError(f"{uri} is a directory: name one file in it")
    return str(_fetch(store, {name: (store.root, info)}, Path(cache)) / name)


def fetch_directory(uri: str, *, cache: str, name: str, patterns: list[str]) -> str:
    """Return the path of a directory's local copy."""
    store = Store(uri)
    found = store.find()
    if "" in found:
        raise RefusedError(f"{uri} is a file: pass the directory that it is in")
    if not found:
        raise RefusedError(f"{uri}: nothing found: check the URI")
    chosen = {each: info for each, info in found.items() if any(fnmatch(each, pattern) for pattern in patterns)}
    if not chosen:
        raise RefusedError(f"{uri}: none of its {len(found)} files matches {', '.join(patterns)}: check the URI")
    for each in chosen:
        _require_inside(uri, each)
    named = {f"{name}/{each}": (store.place(each), info) for each, info in chosen.items()}
    return str(_fetch(store, named, Path(cache)) / name)


def read_text(uri: str, *, name: str) -> str | None:
    """Return the text of a small file; None if there is no such file."""
    store = Store(uri)
    try:
        return store.files.cat_file(store.place(name)).decode()
    except FileNotFoundError:
        return None


def _require_inside(uri: str, name: str) -> None:
    """Refuse a name that would put the file elsewhere, or give it another name."""
    if PurePosixPath(name).as_posix() != name or name.startswith("/") or {"..", "."} & set(name.split("/")):
        raise RefusedError(f"{uri}: the name {name!r} leads outside the directory: rename or remove it there")


def _fetch(store: Store, wanted: dict[str, tuple[str, dict[str, Any]]], cache: Path) -> Path:
    """Return a directory with links to the files' blobs; download the missing blobs.

    Args:
        store: The store to download from.
        wanted: Each file's location in the store and the store's details of it, by its local name.
        cache: The URI's own cache directory.
    """
    tokens = {name: _token(place, info) for name, (place, info) in wanted.items()}
    directory = cache / "snapshots" / _digest(sorted(tokens.items()))
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    with _lock(cache / "lock", store.uri):
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
    """Return a token for a version of a file; if the store does not report versions, every token is new."""
    said = {key: str(value) for key, value in info.items() if _letters_of(key) in VERSIONS and value is not None}
    return _digest([place, info["size"], sorted(said.items()) or uuid.uuid4().hex])


def _letters_of(key: str) -> str:
    return "".join(filter(str.isalnum, key)).lower()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@contextmanager
def _lock(path: Path, uri: str) -> Iterator[None]:
    """Hold a lock on the URI's cache; another process that holds it cannot stall forever, as it is watched too."""
    with path.open("w") as file:
        try:
            while not try_lock(file):
                watched_process.give_sign_of_life()
                time.sleep(0.5)
        except UnlockableError as error:
            found = f"{path.parent}, where it is copied to, cannot be locked ({error.strerror})"
            raise RefusedError(f"{uri}: {found}: set XDG_CACHE_HOME to a file system that has locks") from error
        yield


def _run_concurrently(do: Callable[[str], None], names: list[str]) -> None:
    """Call a function for each name, a few at a time; stop at the first error."""
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
    """Refuse a directory that is taken or cannot be written to."""
    store = Store(uri)
    if found := store.find():
        _require_overwrite(uri, len(found), overwrite)
    store.files.pipe_file(store.place(WRITE_TEST), f"{socket.gethostname()} {time.time()}".encode())
    # Some credentials may write but not delete; then the file stays, and is ignored.
    with suppress(Exception):
        store.files.rm_file(store.place(WRITE_TEST))


def _require_overwrite(uri: str, num_files: int, overwrite: bool) -> None:
    if not overwrite:
        raise RefusedError(
            f"output {uri} is not empty ({num_files} files): choose another --output, or pass --overwrite to replace it"
        )


def upload_directory(uri: str, *, directory: str, last: str, overwrite: bool) -> int:
    """Upload a directory, remove all other files, and then mark it complete; return how many files were there."""
    store, source = Store(uri), Path(directory)
    files = {str(path.relative_to(source)): path for path in sorted(source.rglob("*")) if path.is_file()}
    there = store.find()
    stale = [name for name in there if name not in files]
    # Files of an earlier attempt at this upload, or of the same output, may be replaced.
    if stale or (last in there and store.files.cat_file(store.place(last)) != files[last].read_bytes()):
        _require_overwrite(uri, len(there), overwrite)
    if last in there:
        # From here on the directory is incomplete.
        store.files.rm_file(store.place(last))
    sent: list[str] = []

    def send(name: str) -> None:
        if name not in there or not is_same(files[name], there[name]):
            store.upload(files[name], name)
            sent.append(name)

    _run_concurrently(send, [name for name in files if name != last])
    for name in stale:
        store.files.rm_file(store.place(name) if name else store.root)
    _require_there(store, {name: path for name, path in files.items() if name != last})
    store.upload(files[last], last)
    _require_there(store, files)
    return len(files) - 1 - len(sent)


def upload_file(uri: str, *, file: str, name: str) -> None:
    """Upload one file into the directory."""
    Store(uri).upload(Path(file), name)


def _require_there(store: Store, files: dict[str, Path]) -> None:
    """Raise unless the store has all the files with their sizes."""
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
        watched_process.write(failed=f"{uri}: not found ({watched_process.error_line(error)}): check the URI")
    except Exception as error:
        why = watched_process.error_line(error)
        watched_process.write(
            failed=f"{uri}: the store refused ({why}): check the URI, the credentials and the network"
        )


if __name__ == "__main__":
    watched_process.answer(_run_operation)
