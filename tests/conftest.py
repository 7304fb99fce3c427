"""Shared fixtures: small models on disk, tokens for them, one local Ray and one MLflow store per session."""

import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

# Threads that wait sleep, if this is said before torch is imported. By default they spin, which costs the tests beside
# them a third of their time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from cluster.local_ray import local_ray as started_ray
from tests.elsewhere import Elsewhere
from tests.forked_workers.server import forked_workers
from tests.forks import RUN_IMPORTS, Forks

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
# Every process that tests start inherits these. Ray gives its processes half a minute to start: too little here.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
# Ray Train looks this often whether a worker has ended or reported.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Ray's workers give way to other processes: they would wait for all tests that run beside theirs.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Let every Ray that these tests start fork its workers."""
    serving = ExitStack()
    os.environ.update(serving.enter_context(forked_workers()))
    config.add_cleanup(serving.close)


FIRST_RUN = """
import sys
from pathlib import Path
from orchestrator.tracking import TrackingOptions, tracked_run
assert "mlflow" not in sys.modules, "importing the module imports mlflow: every --help waits for it"
with tracked_run(TrackingOptions(tracking_uri=sys.argv[1], experiment="first"), Path(sys.argv[2])) as run:
    run.log_params({"first": True})
"""


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the system refuse this process larger files, as a disk that is full refuses them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The files of an output that tell when everything happened, or how long it took.
OF_TIME = ("metrics.jsonl", "report.html")


def content(output: Path) -> dict[str, bytes]:
    """Every file of an output, but for those of the time that it took."""
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in OF_TIME]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def shard_processes() -> list[psutil.Process]:
    """The processes of all shards that run for these tests."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::Shard"):
                found.append(process)
    return found


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, data and recorded decisions beside the checkout; tests that need it may skip."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs the shared folder with real models beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests, with more logical CPUs than the machine has, so that several workers fit."""
    with started_ray(num_cpus=8, log_to_driver=False, logging_level="ERROR"):
        yield


@pytest.fixture
def whole_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a Ray that the test starts run workers that import everything themselves, as users' do."""
    monkeypatch.delenv("SLIMLLM_FORKED_WORKERS")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Forks of a process that has imported all of this project, MLflow and its server."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_ADDRESS"))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]), "OMP_NUM_THREADS": "1"}
    # A cluster without authentication is reached by clients without it, whatever token lies in the home folder.
    environment |= {"RAY_AUTH_MODE": "disabled"}
    forks = Forks(RUN_IMPORTS, environment, tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """A Python without this project, for all tests that load a checkpoint there."""
    python = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    yield python
    python.close()


def one_for_all(make: Callable[[Path], None], name: str, factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the first of all processes of these tests makes."""
    # Processes of xdist have folders side by side.
    everyones = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = everyones / name
    with (everyones / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(dir=everyones))
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A new store, migrated by a run in a process of its own; its folder and what that process printed."""
    made = one_for_all(make_first_run, "first-run", tmp_path_factory)
    # Each process has a store of its own.
    folder = tmp_path_factory.mktemp("store") / "store"
    shutil.copytree(made, folder)
    return folder, (folder / "printed").read_text()


def make_first_run(folder: Path) -> None:
    """Make a store by a run in a process of its own, and keep what that process printed."""
    arguments = [f"sqlite:///{folder / 'mlflow.db'}", str(folder / "metrics.jsonl")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-c", FIRST_RUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    shutil.copyfile(folder / "mlflow.db", folder / "copy.db")
    (folder / "printed").write_text(done.stdout + done.stderr)


@pytest.fixture(scope="session")
def tracking_uri(first_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for the runs of all tests, migrated already: that takes seconds."""
    store = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    shutil.copyfile(first_run[0] / "copy.db", store)
    return f"sqlite:///{store}"


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a small random Llama and return its directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB", **settings: object) -> Path:
        defaults: dict[str, object] = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            # Larger than usual, so that layers do something and their outputs differ.
            "initializer_range": 0.15,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(defaults | settings))).to(dtype)
        directory = tmp_path_factory.mktemp("model")
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return make


@pytest.fixture(scope="session")
def mha_model(make_llama: Callable[..., Path]) -> Path:
    """A random Llama whose every head has its own keys and values."""
    return make_llama()


@pytest.fixture(scope="session")
def gqa_model(make_llama: Callable[..., Path]) -> Path:
    """A random Llama with two query heads to a key/value head."""
    return make_llama(num_key_value_heads=2)


@pytest.fixture(scope="session")
def token_blocks() -> np.ndarray:
    """Random token ids (24, 16) for the random models."""
    return np.random.default_rng(0).integers(0, 97, size=(24, 16)).astype(np.int32)


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory, token_blocks: np.ndarray) -> Path:
    """The token blocks as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("tokens") / "tokens.parquet"
    pq.write_table(pa.table({"input_ids": [row.tolist() for row in token_blocks]}), path)
    return path
