"""Runs a hub on this machine, which can be told to fail as real hubs do, and to move its branches."""

import hashlib
import http.server
import json
import re
import socket
import time
from urllib.parse import unquote

from orchestrator.builtin import MODEL_DIR

DOCUMENT = '{"text": "once upon a time"}\n'


class Hub(http.server.ThreadingHTTPServer):
    """A model and a dataset of one repository; `fails` says how answers about it, or its files, go wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir() if path.is_file()}
        self.files["train.jsonl"] = DOCUMENT.encode() * 50
        # Commits by the names of branches and tags, and what they change of the files.
        self.commits = {"main": "a" * 40}
        self.changes: dict[str, dict[str, bytes]] = {"a" * 40: {}}
        self.fails = self.about = ""
        self.asked: list[str] = []

    def commit(self, name: str, sha: str, **changes: bytes) -> None:
        """Let a branch or tag lead to a commit, which changes files; `__` stands for a dot in their names."""
        self.commits[name] = sha
        self.changes[sha] = {name.replace("__", "."): content for name, content in changes.items()}

    def close_request(self, request: object) -> None:
        """Leave what hangs alone."""


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        found = re.search(r"/(?:revision|tree|resolve|paths-info)/([^/]+)", path)
        asked = unquote(found[1]) if found else "main"
        self.commit = self.server.commits.get(asked, asked)
        if self.commit not in self.server.changes:
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        files = self.server.files | self.server.changes[self.commit]
        about, name = ("listing" if path.startswith("/api/") else "files"), path.rpartition("/")[2]
        if self.server.about == about and self.fail(files.get(name, b"[]" * 100)):
            return
        if about == "files":
            self.reply(200 if name in files else 404, files.get(name, b""))
        elif "/tree/" in path:
            blobs = {name: (len(content), hashlib.sha1(content).hexdigest()) for name, content in files.items()}
            entries = [{"type": "file", "path": name, "size": size, "oid": oid} for name, (size, oid) in blobs.items()]
            self.reply(200, json.dumps(entries).encode())
        elif path.startswith(("/api/models/me/tiny", "/api/datasets/me/tiny")):
            siblings = [{"rfilename": name} for name in files]
            self.reply(
                200, json.dumps({"id": "me/tiny", "sha": self.commit, "siblings": siblings, "tags": []}).encode()
            )
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
        usual = {"Content-Length": str(length), "ETag": f'"{etag}"', "X-Repo-Commit": self.commit}
        if status == 404:
            usual["X-Error-Code"] = "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound"
        for name, value in (usual | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""
