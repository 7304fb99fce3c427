"""Text is read from a dataset on a stand-in hub, which supports only what a dataset of one file needs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import DataError, TokenBlocks
from tests.orchestrator.data.sample_files import DOCUMENTS, naive_blocks, naive_ids, write_jsonl

HUB = """
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

data = Path(sys.argv[2]).read_bytes()
entry = {"type": "file", "path": "train.jsonl", "size": len(data), "oid": "b" * 40}
info = {"id": "me/tiny", "sha": "a" * 40, "siblings": [{"rfilename": "train.jsonl"}], "tags": []}

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.endswith("/train.jsonl"):
            self.reply(200, data)
        elif path.startswith("/api/datasets/me/tiny"):
            self.reply(200, json.dumps([entry] if "/tree/" in path else info).encode())
        else:
            self.reply(404, b"")
    do_HEAD = do_POST = do_GET

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
threading.Thread(target=server.serve_forever, daemon=True).start()

import datasets
from orchestrator.data import DataError, TextOptions, load_tokens
from orchestrator.sources import hub, watched_process

class Fork:
    # In place of a process that imports the same once more; test_hub.py starts real ones.
    def __init__(self, command, stdin, stdout, **settings):
        asked, ends = os.pipe(), os.pipe()
        if (child := os.fork()) == 0:
            os.close(asked[1])
            sys.stdin = os.fdopen(asked[0])
            os.dup2(ends[1], 1)
            watched_process.answer(hub.answer)
            os._exit(0)
        os.close(asked[0])
        os.close(ends[1])
        self.stdin, self.stdout = os.fdopen(asked[1], "wb"), os.fdopen(ends[0], "rb")
        self.pid, self.code = child, None

    def kill(self):
        if self.code is None:
            os.kill(self.pid, 9)

    def wait(self):
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

watched_process.subprocess.Popen = Fork

def ask(spec):
    start = time.monotonic()
    options = TextOptions(samples=1000, sequence_length=8)
    model = {"model_dir": Path(sys.argv[1]), "vocab_size": 103, "max_length": 64}
    try:
        said = load_tokens(spec, **model, options=options).input_ids_BT.tolist()
    except DataError as error:
        said = str(error)
    return said, time.monotonic() - start

ask(sys.argv[2])  # so that the seconds of the others are not those of imports
answers = {spec: ask(spec) for spec in sys.argv[3:]}
server.shutdown()
server.server_close()
answers["unreachable"] = ask("me/tiny")
print(json.dumps(answers))
"""


def ask_hub(tmp_path: Path, model_dir: Path, *specs: str) -> dict[str, Any]:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    command = [sys.executable, "-c", HUB, str(model_dir), str(path), *specs]
    proxies = {f"{name}_proxy": "" for name in ("http", "https", "all")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k.lower() not in proxies}
    # Its own home: what this machine's cache of the hub holds must not answer.
    ours = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=clean | ours, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_dataset_on_the_hub(tmp_path: Path, model_dir: Path) -> None:
    specs = [
        "me/tiny",
        "me/tiny:default",
        "me/tiny:default:train",
        "me/tiny@main:default",
        "me/tiny:default:test",
        "me/tiny:no",
        "me/none",
    ]
    answers = ask_hub(tmp_path, model_dir, *specs)
    expected = naive_blocks(naive_ids(DOCUMENTS), 8).tolist()
    assert [answers[spec][0] for spec in specs[:4]] == [expected] * 4
    for spec, said in zip(specs[4:], ["Bad split: test", "'no' not found", "RepositoryNotFoundError"], strict=True):
        assert said in answers[spec][0]
        assert "\n" not in answers[spec][0]
    message, seconds = answers["unreachable"]
    assert "me/tiny: no such file, and the Hugging Face hub did not provide" in message
    assert "give a local file (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .arrow)" in message
    assert seconds < 15  # load_dataset alone retries for 23 s


def test_the_hub_when_offline(
    tmp_path: Path, load: Callable[..., TokenBlocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    # For the process that this one starts.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"ConnectionError.*give a local file"):
        load("me/tiny")
    assert time.monotonic() - start < 15
