"""Runs a store on this machine, moto's S3 over HTTP, which can be told to fail as real stores do."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.conftest import OF_TIME

BUCKET = "bucket"
REFUSED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Quiet(WSGIRequestHandler):
    def log(self, *arguments: Any) -> None:
        """Say nothing."""


class Store:
    """Answers as S3 does, files in `plain` as a web server does; `fails` gives for a request how it goes wrong."""

    def __init__(self) -> None:
        self.s3 = DomainDispatcherApplication(create_backend_app)
        self.fails: Callable[[str, str], str] = lambda method, path: ""
        self.asked: list[tuple[str, str]] = []
        self.plain: dict[str, bytes] = {}
        self.address = ""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked.append((method, path))
        fails = self.fails(method, path)
        if fails == "hang":
            time.sleep(600)
        if fails == "refuse":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(
                "403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(REFUSED)))]
            )
            return [REFUSED]
        if path in self.plain:
            content = self.plain[path]
            start_response("200 OK", [("Content-Length", str(len(content))), ("ETag", '"1"')])
            return [content]
        answer = self.s3(environ, start_response)
        return self._half(b"".join(answer)) if fails == "half" else answer

    def _half(self, content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        raise ConnectionAbortedError

    # What tests put there and find there, past all that goes wrong.

    @property
    def client(self) -> Any:
        return boto3.client("s3")

    def put(self, folder: Path, prefix: str) -> str:
        """Put the files of a folder, or one file, under a prefix; return the URI."""
        for path in [folder] if folder.is_file() else folder.rglob("*"):
            if path.is_file():
                name = path.name if folder.is_file() else path.relative_to(folder).as_posix()
                self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}" + (f"/{folder.name}" if folder.is_file() else "")

    def content(self, prefix: str) -> dict[str, bytes]:
        """Every file under a prefix, but for those of the time that it took."""
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        keys = [entry["Key"] for entry in listed if not entry["Key"].endswith(OF_TIME)]
        return {key.removeprefix(f"{prefix}/"): self.read(key) for key in keys}

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()


@contextmanager
def serving_store(store: Store) -> Iterator[Store]:
    """Serve on a free port until the context ends."""
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    # What hangs is left alone.
    server.block_on_close = False
    store.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
