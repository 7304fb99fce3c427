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

STALLED_SECONDS = 60.0
HUB_TIMEOUT_SECONDS = 10.0


class HubError(RuntimeError):
    """A failure to get something from the hub; the message says why."""


def download_model(model: str, patterns: tuple[str, ...]) -> Path:
    """Return the local directory of a hub model, downloading it if needed; every file in it is complete.

    Raises:
        HubError: The hub cannot provide it, or nothing came for a while.
    """
    (directory,) = _ask("model", model, *patterns)
    return Path(directory)


def dataset_rows(name: str, config: str | None, split: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub dataset lazily; every column that is not asked for has the value None.

    Raises:
        HubError: The hub cannot provide it, or nothing came for a while.
    """
    return _ask("dataset", name, config or "", split, *columns)


def find_model(model: str, patterns: tuple[str, ...]) -> Path | None:
    """Return the directory of a hub model that was downloaded before, else None; never contact the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), local_files_only=True))
    # Catch everything: the name may not be a hub id, or the cache may be broken.
    except Exception:
        return None


def size_of_model(model: str, patterns: tuple[str, ...]) -> int:
    """Return the download size of a hub model in bytes.

    Raises:
        HubError: The hub does not report it.
    """
    (size,) = _ask("size", model, *patterns)
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


def _model(name: str, *patterns: str) -> None:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    # Imports take seconds, which must not count as the hub's.
    watched_process.give_sign_of_life()
    if not constants.HF_HUB_OFFLINE:
        # With no network, or no such model, this fails at once.
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    Thread(target=_report_growth, args=(cache,), daemon=True).start()
    watched_process.write(given=snapshot_download(name, allow_patterns=list(patterns)))


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


def _dataset(name: str, config: str, split: str, *columns: str) -> None:
    import datasets
    from huggingface_hub import HfApi

    watched_process.give_sign_of_life()
    # With no network load_dataset retries for 23 s; this fails at once. Offline mode needs only a cache.
    if not datasets.config.HF_HUB_OFFLINE:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    for row in datasets.load_dataset(name, config or None, split=split, streaming=True):
        watched_process.write(given={column: row[column] if column in columns else None for column in row})


def _size(name: str, *patterns: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    watched_process.give_sign_of_life()
    files = HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS, files_metadata=True).siblings or []
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
ANSWERS: dict[str, Callable[..., None]] = {"model": _model, "dataset": _dataset, "size": _size, "reach": _reach}


def answer(kind: str, *asked: str) -> None:
    """Write what was asked for."""
    ANSWERS[kind](*asked)


if __name__ == "__main__":
    watched_process.answer(answer)
