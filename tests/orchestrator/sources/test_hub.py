"""A local hub that fails as real hubs do: a request is fully served, or one line soon says why it was not."""

import os
import select
import time
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.builtin import MODEL_DIR
from orchestrator.config import PruneConfig
from orchestrator.data import DataError
from orchestrator.data.documents import read_documents
from orchestrator.data.files import local_file
from orchestrator.preflight import doctor
from orchestrator.sources import hub, watched_process
from orchestrator.sources.models import resolve_model
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError
from tests.orchestrator.sources.hubs import Hub


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after a silent second, once the process has imported its libraries and said so."""
    least = chain([60.0], repeat(0.0))

    def wait(*streams_and_seconds: Any) -> Any:
        *streams, seconds = streams_and_seconds
        return select.select(*streams, max(seconds, next(least)))

    monkeypatch.setattr(hub, "STALLED_SECONDS", 1.0)
    monkeypatch.setattr(watched_process, "select", SimpleNamespace(select=wait))


def test_a_model_comes_whole(server: Hub) -> None:
    directory = resolve_model("me/tiny").directory
    assert Checkpoint.open(directory).digest() == Checkpoint.open(MODEL_DIR).digest()
    # Of all that a repository may hold, what a model needs: no data, no code.
    assert "train.jsonl" not in {path.name for path in directory.iterdir()}


def test_files_come_whole_by_their_uris(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = resolve_model("hf://me/tiny").directory
    assert Checkpoint.open(directory).digest() == Checkpoint.open(MODEL_DIR).digest()
    path = local_file("hf://datasets/me/tiny/train.jsonl")
    assert path is not None
    assert path.read_bytes() == server.files["train.jsonl"]
    with pytest.raises(CheckpointError, match=r"^model hf://me/none: the hub could not provide it \(File"):
        resolve_model("hf://me/none")


@pytest.mark.parametrize(
    ("about", "fails"),
    [
        *(("listing", fails) for fails in ("500", "garbage", "hang")),
        *(("files", fails) for fails in ("429", "garbage", "drop", "half", "stall")),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_hub_that_fails(server: Hub, fails: str, about: str, tmp_path: Path) -> None:
    server.fails, server.about = fails, about
    start = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        # What looks whole, but is not, is found when it is opened.
        Checkpoint.open(resolve_model("me/tiny").directory)
    assert time.monotonic() - start < 40
    assert str(raised.value).isprintable()
    if fails in ("hang", "stall"):
        assert "nothing came for 1 s" in str(raised.value)
    if (fails, about) != ("garbage", "files"):
        assert "me/tiny is not a local directory, and the hub could not provide it (" in str(raised.value)
        assert not list(tmp_path.glob("home/hub/models--me--tiny/snapshots/*/model.safetensors"))


def test_a_model_that_is_not_there(server: Hub) -> None:
    with pytest.raises(
        CheckpointError, match=r"me/none .* could not provide it \(RepositoryNotFoundError: .*check the name"
    ):
        resolve_model("me/none")


def test_the_doctor_asks_for_sizes_and_downloads_nothing(server: Hub, tmp_path: Path) -> None:
    assert hub.reach_hub() == os.environ["HF_ENDPOINT"]
    found, check = doctor.find_model("me/tiny")
    assert (found, check.ok) == (None, True)
    assert "me/tiny is on the hub and not here yet" in check.found
    found, check = doctor.find_model("me/none")
    assert (found, check.ok) == (None, False)
    assert "RepositoryNotFoundError" in check.found
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("fails", ["500", "hang"])
@pytest.mark.usefixtures("impatient")
def test_a_hub_that_does_not_answer_the_doctor(server: Hub, fails: str) -> None:
    server.fails, server.about = fails, "files"
    check = doctor.check_hub(PruneConfig(model="me/tiny"), found=False)
    assert (check.ok, check.remedy) == (False, "repair the network, or give paths in place of me/tiny")


def no_chat(messages: list[dict[str, Any]], tools: list[Any] | None, where: str) -> str:
    raise AssertionError(f"{where} is no chat")


@pytest.mark.parametrize("fails", ["500", "hang"])
@pytest.mark.usefixtures("impatient")
def test_a_dataset_of_a_hub_that_fails(server: Hub, fails: str) -> None:
    server.fails, server.about = fails, "files"
    with pytest.raises(DataError, match=r"me/tiny: no such file, and the .* hub did not provide .*give a local file"):
        list(read_documents("me/tiny", None, no_chat))


def test_a_row_that_has_no_text_is_said_of_the_row(server: Hub) -> None:
    server.files = {"train.jsonl": b'{"text": "one"}\n{"text": null}\n'}
    documents = read_documents("me/tiny", None, no_chat)
    assert next(documents).text == "one"
    with pytest.raises(DataError, match=r"^me/tiny: row 1: 'text' is null: give a string, or drop the row$"):
        next(documents)


def test_the_process_ends_with_whoever_reads(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    popen = watched_process.subprocess.Popen

    def noted(*arguments: object, **settings: object) -> object:
        process = popen(*arguments, **settings)
        started.append(process.pid)
        return process

    monkeypatch.setattr(watched_process.subprocess, "Popen", noted)
    documents = read_documents("me/tiny", None, no_chat)
    assert next(documents).text == "once upon a time"
    documents.close()
    (pid,) = started
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
