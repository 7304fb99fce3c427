"""Downloads from the Hugging Face hub, even when its answers are wrong, late, incomplete or missing.

The hub's libraries wait for some answers forever, or for as long as a server tells them to, in threads that cannot be
stopped. So they run in a child process (watched_process.py), which is killed if it produces nothing for a while.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from orchestrator.sources import watched_process
from orchestrator.sources.hub_private import cache_of_model

STALLED_SECONDS = 60.0
HUB_TIMEOUT_SECONDS = 10.0


class HubError(RuntimeError):
    """A failure to get something from the hub; the message says why."""


def download_model(model: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """Return the local directory of a hub model, downloading it if needed; every file in it is complete.

    Args:
        model: The hub id.
        patterns: Which files to download.
        revision: A branch, a tag or a commit; None for the main branch.

    Raises:
        HubError: The hub cannot provide it, or nothing came for a while.
    """
    (directory,) = _ask("model", model, revision or "", *patterns)
    return Path(directory)


def commit_of(directory: Path) -> str:
    """Return the commit of a downloaded model: the hub's cache names directories by it."""
    return directory.name


def is_hub_uri(uri: str) -> bool:
    """Return whether a URI is of the hub."""
    return uri.lower().startswith("hf://")


def pin_uri(uri: str) -> tuple[str, str | None]:
    """Return the URI of the same file or directory at the commit that the hub has now, and that commit.

    A bucket has no commits: the URI stays as it is, and the commit is None.

    Raises:
        HubError: The hub has no such repository or revision, or does not answer.
    """
    ((pinned, commit),) = _ask("pin", uri)
    return pinned, commit


def find_commit(dataset: str, revision: str | None) -> str | None:
    """Return the commit of a dataset's branch, tag or commit; None in offline mode, where only a cache is read.

    Raises:
        HubError: The hub has no such dataset or revision, or does not answer.
    """
    (commit,) = _ask("commit", dataset, revision or "")
    return commit


def dataset_rows(
    name: str, revision: str | None, config: str | None, split: str, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub dataset lazily; every column that is not asked for has the value None.

    Raises:
        HubError: The hub cannot provide it, or nothing came for a while.
    """
    return _ask("dataset", name, revision or "", config or "", split, *columns)


def find_model(model: str, patterns: tuple[str, ...], revision: str | None = None) -> Path | None:
    """Return the directory of a hub model that was downloaded before, else None; never contact the hub."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model, revision=revision, allow_patterns=list(patterns), local_files_only=True)
    # Catch everything: the name may not be a hub id, or the cache may be broken.
    except Exception:
        return None
    return Path(found)


def size_of_model(model: str, patterns: tuple[str, ...], revision: str | None = None) -> int:
    """Return the download size of a hub model in bytes.

    Raises:
        HubError: The hub does not report it.
    """
    (size,) = _ask("size", model, revision or "", *patterns)
    return int(size)


def reach_hub() -> str:
    """Return the hub's address if the hub answers.

    Raises:
        HubError: It does not answer, or the hub's libraries are in offline mode.
    """
    (address,) = _ask("reach")
    return str(address)


def _ask(*arguments: str) -> Iterator[Any]:
    try:
        yield from watched_process.ask("orchestrator.sources.hub", *arguments, stalled_seconds=STALLED_SECONDS)
    except watched_process.WatchedProcessError as error:
        raise HubError(str(error)) from error


# ---- In the child process


def _model(name: str, revision: str, *patterns: str) -> None:
    from huggingface_hub import HfApi, constants, snapshot_download

    # Imports take seconds, which must not count as the hub's.
    watched_process.give_sign_of_life()
    if not constants.HF_HUB_OFFLINE:
        # With no network, or no such model, this fails at once.
        HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT_SECONDS)
    Thread(target=_report_growth, args=(cache_of_model(name),), daemon=True).start()
    # By the revision and not by its commit: the cache then knows the revision when the hub is away.
    found = snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
    watched_process.write(given=found)


def _report_growth(directory: Path) -> None:
    """Give a sign of life for each second in which a directory grew."""
    before = 0
    while True:
        time.sleep(1)
        try:
            size = sum(path.lstat().st_size for path in directory.rglob("*"))
        except OSError:  # a file was renamed meanwhile
            continue
        if size != before:
            watched_process.give_sign_of_life()
        before = size


def _pin(uri: str) -> None:
    from huggingface_hub import HfApi, HfFileSystem

    watched_process.give_sign_of_life()
    place: Any = HfFileSystem().resolve_path(uri)
    if not hasattr(place, "repo_id"):
        watched_process.write(given=[uri, None])
        return
    repository, asked = place.repo_id, {"repo_type": place.repo_type, "revision": place.revision}
    commit = HfApi().repo_info(repository, timeout=HUB_TIMEOUT_SECONDS, **asked).sha
    kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    inside = f"/{place.path_in_repo}" if place.path_in_repo else ""
    watched_process.write(given=[f"hf://{kind}{repository}@{commit}{inside}", commit])


def _commit(dataset: str, revision: str) -> None:
    from huggingface_hub import HfApi, constants

    watched_process.give_sign_of_life()
    if constants.HF_HUB_OFFLINE:
        watched_process.write(given=None)
        return
    found = HfApi().dataset_info(dataset, revision=revision or None, timeout=HUB_TIMEOUT_SECONDS)
    watched_process.write(given=found.sha)


def _dataset(name: str, revision: str, config: str, split: str, *columns: str) -> None:
    import datasets
    from huggingface_hub import HfApi

    watched_process.give_sign_of_life()
    # With no network load_dataset retries for 23 s; this fails at once. Offline mode needs only a cache.
    if not datasets.config.HF_HUB_OFFLINE:
        HfApi().dataset_info(name, revision=revision or None, timeout=HUB_TIMEOUT_SECONDS)
    rows = datasets.load_dataset(name, config or None, split=split, revision=revision or None, streaming=True)
    for row in rows:
        watched_process.write(given={column: row[column] if column in columns else None for column in row})


def _size(name: str, revision: str, *patterns: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    watched_process.give_sign_of_life()
    found = HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT_SECONDS, files_metadata=True)
    files = found.siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    watched_process.write(given=sum(sizes[path] for path in filter_repo_objects(sizes, allow_patterns=list(patterns))))


def _reach() -> None:
    from huggingface_hub import constants

    watched_process.give_sign_of_life()
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set: only earlier downloads can be used")
    try:
        with urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS):
            pass
    except HTTPError as error:
        # Any other status shows that the server is there.
        if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
    watched_process.write(given=constants.ENDPOINT)


# What the child process can be asked for, by its first argument.
ANSWERS: dict[str, Callable[..., None]] = {
    "model": _model,
    "pin": _pin,
    "commit": _commit,
    "dataset": _dataset,
    "size": _size,
    "reach": _reach,
}


def answer(kind: str, *asked: str) -> None:
    """Write what was asked for."""
    ANSWERS[kind](*asked)


if __name__ == "__main__":
    watched_process.answer(answer)
