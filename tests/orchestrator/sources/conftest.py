"""Fixtures for tests of object stores: a store on this machine, and commands that use it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked_workers.server import FORKED
from tests.orchestrator.sources.hubs import Hub
from tests.orchestrator.sources.storage_commands import IN_URI, OUTPUT, SECRETS, SMALL, run
from tests.orchestrator.stores import BUCKET, Store, serving_store


@pytest.fixture(scope="session", autouse=True)
def forks_are_ready() -> None:
    """Let imports be over before a test gives what is silent a second or two."""
    subprocess.run([sys.executable, "-c", ""], env=os.environ | FORKED, check=True, timeout=120)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The store, which the environment names, and a cache of the module's own."""
    with pytest.MonkeyPatch.context() as patch, serving_store(Store()) as store:
        for name in [name for name in os.environ if name.lower().startswith(("aws_", "http_proxy", "https_proxy"))]:
            patch.delenv(name)
        settings = {"AWS_ENDPOINT_URL": f"http://{store.address}", "AWS_ACCESS_KEY_ID": "me", **SECRETS}
        settings |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        store.client.create_bucket(Bucket=BUCKET)
        yield store


@pytest.fixture
def store(served: Store) -> Iterator[Store]:
    """The store, in order before and after a test."""
    yield served
    served.fails = lambda method, path: ""


@pytest.fixture(scope="module")
def uris(served: Store, gqa_model: Path, token_file: Path, held_out_file: Path) -> dict[str, str]:
    """Where a run's inputs are: in the store, and some of the data at an address that has a password."""
    served.plain["/plain/held-out.parquet"] = held_out_file.read_bytes()
    return {
        "model": served.put(gqa_model, "models/tiny"),
        "calibration": served.put(token_file, "data"),
        "held_out": served.put(held_out_file, "data"),
        "by_password": f"http://me:{IN_URI}@{served.address}/plain/held-out.parquet",
    }


@pytest.fixture(scope="module")
def asked(uris: dict[str, str], tracking_uri: str) -> list[str]:
    """A command that has everything by URI."""
    inputs = [uris["model"], "--calibration", uris["calibration"]]
    held_out = ["--evaluate", uris["held_out"], "--evaluate", uris["by_password"]]
    return ["prune", *inputs, *held_out, *SMALL, "--tracking-uri", tracking_uri, "--output", OUTPUT]


@pytest.fixture(scope="module")
def asked_here(gqa_model: Path, token_file: Path) -> list[str]:
    """A command whose output alone goes to the store."""
    inputs = [str(gqa_model), "--calibration", str(token_file)]
    return ["prune", *inputs, *SMALL, "--tracking-uri", "none", "--output"]


@pytest.fixture(scope="module")
def remote_run(served: Store, asked: list[str]) -> dict[str, object]:
    """What a whole run to the store says of itself."""
    return json.loads(run([*asked, "--json"]).stdout)


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
