"""What comes from the Hugging Face hub, whatever the hub does: answers wrongly, late, in part or never.

The hub's libraries wait for some answers without end, and for as long as a server tells them to, in threads that
nobody can end. So they run in a process of their own (`python -m orchestrator.hub`), which is ended when nothing comes
from it. It writes lines of JSON: {"given": what was asked for} or {"failed": why}; an empty line is a sign of life.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

STALLED_SECONDS = 60.0
HUB_TIMEOUT_SECONDS = 10.0


class HubError(RuntimeError):
    """The hub did not give what was asked for; the message says why."""


def download_model(model: str, patterns: tuple[str, ...]) -> Path:
    """Return the directory of a hub's model, downloaded if need be; a file is there only if it is whole.

    Raises:
        HubError: the hub cannot give it, or nothing came for a while.
    """
    (directory,) = _ask("model", model, *patterns)
    return Path(directory)


def dataset_rows(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub's dataset as they are taken: the names of their columns, and of "text" the value.

    Raises:
        HubError: the hub cannot give it, or nothing came for a while.
    """
    return _ask("dataset", name, config or "", split)


def _ask(*arguments: str) -> Iterator[Any]:
    """Yield what the process gives."""
    with _started(arguments) as process:
        for line in _lines(process):
            if not line:
                continue
            said = json.loads(line)
            if "failed" in said:
                raise HubError(said["failed"])
            yield said["given"]
        if code := process.wait():
            raise HubError(f"the process that reads from it ended with code {code}")


@contextmanager
def _started(arguments: tuple[str, ...]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run this module in a process, and end it with this block; it imports nothing from the directory it is run in."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "orchestrator.hub", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: "subprocess.Popen[bytes]") -> Iterator[bytes]:
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    while True:
        if not select.select([descriptor], [], [], STALLED_SECONDS)[0]:
            raise HubError(f"nothing came for {STALLED_SECONDS:g} s")
        if not (read := os.read(descriptor, 1 << 16)):
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from lines


# ---- In the process


def _write(**said: object) -> None:
    # What JSON has no word for is no text either.
    sys.stdout.write(json.dumps(said, default=lambda value: [type(value).__name__]) + "\n")
    sys.stdout.flush()


def _give_sign_of_life() -> None:
    os.write(sys.stdout.fileno(), b"\n")


def _model(name: str, *patterns: str) -> None:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    # What is imported takes seconds, which are not the hub's.
    _give_sign_of_life()
    if not constants.HF_HUB_OFFLINE:
        # With no network, or no such model, this fails at once.
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    Thread(target=_tell_of_growth, args=(cache,), daemon=True).start()
    _write(given=snapshot_download(name, allow_patterns=list(patterns)))


def _tell_of_growth(directory: Path) -> None:
    """Give a sign of life for every second in which a directory grew."""
    before = 0
    while True:
        time.sleep(1)
        try:
            size = sum(path.lstat().st_size for path in directory.rglob("*"))
        except OSError:  # one was renamed meanwhile
            continue
        if size != before:
            _give_sign_of_life()
        before = size


def _dataset(name: str, config: str, split: str) -> None:
    import datasets
    from huggingface_hub import HfApi

    _give_sign_of_life()
    # With no network load_dataset retries for 23 s; this fails at once. Offline mode needs only a cache.
    if not datasets.config.HF_HUB_OFFLINE:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    for row in datasets.load_dataset(name, config or None, split=split, streaming=True):
        _write(given={column: row["text"] if column == "text" else None for column in row})


def _answer(kind: str, *arguments: str) -> None:
    try:
        (_model if kind == "model" else _dataset)(*arguments)
    # Any: these libraries have changed their HTTP library, and with it the exceptions that reach their callers.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        _write(failed=f"{type(error).__name__}: {reason}" if reason else type(error).__name__)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
