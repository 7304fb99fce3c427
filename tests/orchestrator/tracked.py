"""Helpers for tests of tracking: a server in its own process, and a run that logs one thing of each kind."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from mlflow import MlflowClient

from orchestrator.tracking import Run
from tests.forks import Forks

# The app of `mlflow server` in one process: the command itself starts nine and takes half a minute.
SERVER = """
import os
import mlflow.server as server
os.environ[server.BACKEND_STORE_URI_ENV_VAR] = os.environ[server.REGISTRY_STORE_URI_ENV_VAR] = {store!r}
os.environ[server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
os.environ[server.SERVE_ARTIFACTS_ENV_VAR] = "true"
os.environ[server.ARTIFACTS_DESTINATION_ENV_VAR] = {artifacts!r}
server.app.run(host="127.0.0.1", port={port})
"""


@dataclass(frozen=True)
class TrackingServer:
    """A server that runs; `store` is the database behind it."""

    process: psutil.Process
    address: str
    store: str


@contextmanager
def serving(forks: Forks, folder: Path, port: int) -> Iterator[TrackingServer]:
    """Serve the mlflow.db of a folder until the context ends, from a fork of a process that has imported MLflow."""
    store, artifacts = f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artifacts")
    process = forks.start(SERVER.format(store=store, artifacts=artifacts, port=port)).process
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert process.is_running()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield TrackingServer(process, f"http://127.0.0.1:{port}", store)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait(timeout=10)


def log_everything(run: Run, files: Path | None = None) -> None:
    run.log_params({"sparsity": 0.2, "model": Path("a/b"), "ratios": np.array([1, 2]), "none": None})
    for layer in range(3):
        run.log_metrics({"heads_kept": np.int64(8 - layer), "channels_kept": 100.0 + layer}, step=layer)
    run.log_metrics({"perplexity": 7.25})
    run.log_dataset("wikitext", "ab" * 32, "calibration", "train.txt", n_blocks=4, block_length=16, n_tokens=64)
    if files:
        run.log_artifacts(files, to="pruning")


def assert_everything_logged(client: MlflowClient, run_id: str) -> None:
    run = client.get_run(run_id)
    assert run.data.params == {"sparsity": "0.2", "model": "a/b", "ratios": "[1, 2]", "none": "None"}
    assert steps_of(client, run_id, "heads_kept") == [(0, 8.0), (1, 7.0), (2, 6.0)]
    assert steps_of(client, run_id, "perplexity") == [(0, 7.25)]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("wikitext", ("ab" * 32)[:36])
    assert json.loads(dataset.dataset.source) == {"source": "train.txt", "digest": "ab" * 32}
    assert json.loads(dataset.dataset.profile) == {"num_rows": 4, "num_elements": 64, "block_length": 16}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "calibration")]


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
