"""A local hub that fails as real hubs do: a request is fully served, or one line soon says why it was not."""

import hashlib
import http.server
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
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
from orchestrator.inputs import resolve_model
from orchestrator.preflight import doctor
from orchestrator.sources import hub, watched_process
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError

DOCUMENT = '{"text": "once upon a time"}\n'


class Hub(http.server.ThreadingHTTPServer):
    """A model and a dataset of one repository; `fails` says how answers about it, or its files, go wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir() if path.is_file()}
        self.files["train.jsonl"] = DOCUMENT.encode() * 50
        self.fails = self.about = ""
        self.asked: list[str] = []

    def close_request(self, request: object) -> None:
        """Leave what hangs alone."""


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        about, name = ("listing" if path.startswith("/api/") else "files"), path.rpartition("/")[2]
        if self.server.about == about and self.fail(self.server.files.get(name, b"[]" * 100)):
            return
        if about == "files":
            self.reply(200 if name in self.server.files else 404, self.server.files.get(name, b""))
        elif "/tree/" in path:
            sizes = {name: len(content) for name, content in self.server.files.items()}
            entries = [{"type": "file", "path": name, "size": size, "oid": "b" * 40} for name, size in sizes.items()]
            self.reply(200, json.dumps(entries).encode())
        elif path.startswith(("/api/models/me/tiny", "/api/datasets/me/tiny")):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.reply(200, json.dumps({"id": "me/tiny", "sha": "a" * 40, "siblings": siblings, "tags": []}).encode())
        else:
            self.reply(404, b"")

    do_HEAD = do_POST = do_GET

    def fail(self, content: bytes) -> bool:
        """Go wrong in the way that is asked for; return whether that was the answer."""
        fails = self.server.fails
        if fails.isdigit():
            self.reply(int(fails), b"no", {"Retry-After": "100000"})
        elif fails == "garbage":
            self.reply(200, b"<html>\xff" * (len(content) // 7) + b"\0" * (len(content) % 7))
        elif fails == "hang":
            time.sleep(600)
        elif fails == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fails in ("half", "stall") and self.command == "GET":
            self.head(200, len(content), {})
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            time.sleep(600 if fails == "stall" else 0)
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            return False
        return True

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.head(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        etag = hashlib.sha1(self.path.encode()).hexdigest()
        for name, value in (
            {"Content-Length": str(length), "ETag": f'"{etag}"', "X-Repo-Commit": "a" * 40} | headers
        ).items():
            self.send_header(name, value)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub for the processes that this one starts, which know no other, and a cache of their own."""
    for name in os.environ:
        if name.startswith("HF_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


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
    directory = resolve_model("me/tiny")
    assert Checkpoint.open(directory).digest() == Checkpoint.open(MODEL_DIR).digest()
    # Of all that a repository may hold, what a model needs: no data, no code.
    assert "train.jsonl" not in {path.name for path in directory.iterdir()}


def test_files_come_whole_by_their_uris(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = resolve_model("hf://me/tiny")
    assert Checkpoint.open(directory).digest() == Checkpoint.open(MODEL_DIR).digest()
    path = local_file("hf://datasets/me/tiny/train.jsonl")
    assert path is not None
    assert path.read_bytes() == server.files["train.jsonl"]
    with pytest.raises(CheckpointError, match=r"^model hf://me/none: not found \("):
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
        Checkpoint.open(resolve_model("me/tiny"))
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
