"""Fixtures that run the whole pipeline on the session's Ray and MLflow store, and stores and servers for tracking."""

import io
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from mlflow import MlflowClient
from rich.console import Console

from orchestrator import PruneConfig
from orchestrator.pipeline import PruneResult, prune
from orchestrator.progress import Reporter
from orchestrator.pruning import backends
from orchestrator.record import figures
from orchestrator.reports import svg
from tests.forks import Forks
from tests.orchestrator.tracked import TrackingServer, serving

PruneModel = Callable[..., PruneResult]


def save_nothing(figure: object, path: Path) -> None:
    """Leave an empty file in place of a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def draw_nothing(figure: object) -> bytes:
    """Return an empty figure for a report."""
    return b'<svg viewBox="0 0 1 1"/>'


@pytest.fixture(scope="session")
def prune_model(token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneModel:
    """Prune a model by a third in this process, with a journal and no MLflow, unless told otherwise.

    Figures are composed, and not rendered unless a test asks for it: that takes a third of a run's time.
    """

    def run(model: Path, rendered: bool = False, **settings: Any) -> PruneResult:
        defaults = {"calibration": str(token_file), "tracking_uri": "none", "local": True}
        if "ratio" not in settings:
            defaults["sparsity"] = 0.33
        output = tmp_path_factory.mktemp("run") / "pruned"
        config = PruneConfig(**{"model": str(model), "output": str(output), **defaults, **settings})
        with pytest.MonkeyPatch.context() as patch:
            if not rendered:
                patch.setattr(figures, "_save", save_nothing)
                patch.setattr(svg, "_drawn", draw_nothing)
            return prune(config, Reporter(Console(file=io.StringIO())))

    return run


@pytest.fixture(scope="session")
def prune_on_ray(local_ray: None, prune_model: PruneModel) -> PruneModel:
    """The same on the session's Ray, on one worker."""

    def run(model: Path, **settings: Any) -> PruneResult:
        return prune_model(model, **{"local": False, "workers": 1, **settings})

    return run


@pytest.fixture
def cpus_of_ray(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a local run have as many CPUs as the session's Ray: it computes with as many threads, to the same bits."""
    cpus = int(ray.cluster_resources()["CPU"])
    monkeypatch.setattr(backends.os, "sched_getaffinity", lambda process: set(range(cpus)))


@pytest.fixture(scope="session")
def held_out_blocks() -> np.ndarray:
    """Other random token ids (10, 16)."""
    return np.random.default_rng(1).integers(0, 97, size=(10, 16)).astype(np.int32)


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory, held_out_blocks: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "held-out.parquet"
    pq.write_table(pa.table({"input_ids": held_out_blocks.tolist()}), path)
    return path


@pytest.fixture(scope="session")
def gqa_run(prune_on_ray: PruneModel, tracking_uri: str, gqa_model: Path, held_out_file: Path) -> PruneResult:
    """The random model with grouped queries, pruned on Ray, evaluated, tracked in MLflow and registered."""
    evaluate = (str(held_out_file),)
    places = {"tracking_uri": tracking_uri, "register": "tiny", "run_name": "the run"}
    return prune_on_ray(gqa_model, evaluate=evaluate, rendered=True, **places)


@pytest.fixture(scope="session")
def uri(first_run: tuple[Path, str]) -> str:
    return f"sqlite:///{first_run[0] / 'mlflow.db'}"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def other_store(first_run: tuple[Path, str], tmp_path: Path) -> Path:
    """The folder of another store, as the store was after its first run."""
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copyfile(first_run[0] / "copy.db", folder / "mlflow.db")
    return folder


@pytest.fixture
def server(forks: Forks, other_store: Path, free_port: tuple[int, socket.socket]) -> Iterator[TrackingServer]:
    """An MLflow server on a copy of the store."""
    port, sock = free_port
    sock.close()
    with serving(forks, other_store, port) as started:
        yield started


@pytest.fixture
def free_port() -> Iterator[tuple[int, socket.socket]]:
    """A port that nobody listens at, and the socket that holds it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1], sock


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "out" / "pruning" / "metrics.jsonl"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files that look like a model."""
    folder = tmp_path / "checkpoint"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(1 << 18))
    (folder / "nested" / "config.json").write_text("{}")
    return folder
