"""Two models to measure beside each other, and a call that measures them."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.progress import Reporter
from orchestrator.speed.bench import BenchResult, bench
from orchestrator.speed.config import BenchConfig
from tests.orchestrator.conftest import PruneModel

Bench = Callable[..., BenchResult]


@pytest.fixture(scope="session")
def pair(prune_model: PruneModel, gqa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model and the same without a third of its parameters, in one folder."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(gqa_model, folder / "dense")
    shutil.copytree(prune_model(gqa_model, method="gram").output, folder / "pruned")
    return folder / "dense", folder / "pruned"


@pytest.fixture(scope="session")
def bench_models() -> Bench:
    """Measure models with little work, with a journal and no MLflow, unless told otherwise."""

    def run(*models: Path, **settings: Any) -> BenchResult:
        little = {"batch_size": (1, 2), "prompt_length": (4, 8), "new_tokens": 3, "rounds": 2, "threads": 1}
        config = BenchConfig(models=tuple(map(str, models)), **{"tracking_uri": "none"} | little | settings)
        return bench(config, Reporter(Console(file=io.StringIO())))

    return run
