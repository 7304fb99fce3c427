"""A job server that has just started is waited for."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster import ClusterError, job_client
from cluster.jobs import JobServer

# Word for word what Ray's head answers before its agent is there.
NO_AGENT = (500, "No available agent to submit job, please try again later.")
ACCEPTED = (200, json.dumps({"submission_id": "one", "job_id": "one"}))
VERSION = (200, json.dumps({"version": "4", "ray_version": "2.50.0", "ray_commit": ""}))
Served = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server that answers each path with these, the last one for ever; its address, and what it was asked."""
    monkeypatch.setattr(job_client, "AGAIN_SECONDS", 0.01)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    servers = []

    def serve(**answers: list[tuple[int, str]]) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                key = "version" if self.path.startswith("/api/version") else "jobs"
                asked.append(f"{self.command} {key}")
                left = answers[key]
                status, text = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = answer

            def log_message(self, *arguments: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_head_without_an_agent_is_waited_for_and_told_once(served: Served) -> None:
    answers = [NO_AGENT, NO_AGENT, (503, "later"), ACCEPTED]
    address, asked = served(version=[(503, ""), (502, ""), VERSION], jobs=answers)
    told: list[str] = []
    assert JobServer(address, told.append).submit(["true"], []) == "one"
    assert asked[:3] == ["GET version"] * 3
    assert asked.count("POST jobs") == 4
    assert told == ["waiting up to 60 s for the cluster's job server, which is starting"]


def test_the_wait_has_a_limit_and_ends_with_what_the_server_says(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_client, "STARTING_SECONDS", 0.1)
    address, asked = served(version=[VERSION], jobs=[NO_AGENT])
    with pytest.raises(ClusterError, match=r"refused: .*No available agent to submit job"):
        JobServer(address).submit(["true"], [])
    assert len(asked) > 2


@pytest.mark.parametrize("answer", [(500, "another failure"), (502, "bad gateway"), (504, "timeout"), (400, "wrong")])
def test_what_may_have_made_a_job_is_not_asked_again(served: Served, answer: tuple[int, str]) -> None:
    address, asked = served(version=[VERSION], jobs=[answer, ACCEPTED])
    with pytest.raises(ClusterError, match=answer[1]):
        JobServer(address).submit(["true"], [])
    assert asked.count("POST jobs") == 1


def test_a_port_where_nothing_listens_is_given_a_moment(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_client, "REFUSING_SECONDS", 0.1)
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=r"no Ray job server answers at http://127.0.0.1:1: check --address"):
        JobServer("http://127.0.0.1:1")
    assert time.monotonic() - begun > 0.1
