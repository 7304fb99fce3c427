"""Runs of the whole pipeline on the session's Ray and MLflow store."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from orchestrator import PruneConfig
from orchestrator.pipeline import PruneResult, prune
from orchestrator.progress import Reporter

PruneModel = Callable[..., PruneResult]


@pytest.fixture(scope="session")
def prune_model(
    local_ray: None, tracking_uri: str, token_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> PruneModel:
    """Prune a model on one worker, quietly, by a third, unless told otherwise."""

    def run(model: Path, **settings: Any) -> PruneResult:
        defaults = {"calibration": str(token_file), "tracking_uri": tracking_uri, "workers": 1}
        if "ratio" not in settings:
            defaults["sparsity"] = 0.33
        output = tmp_path_factory.mktemp("run") / "pruned"
        config = PruneConfig(**{"model": str(model), "output": str(output), **defaults, **settings})
        return prune(config, Reporter(Console(file=io.StringIO())))

    return run


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
def gqa_run(prune_model: PruneModel, gqa_model: Path, held_out_file: Path) -> PruneResult:
    """The random model with grouped queries, pruned, evaluated and registered."""
    return prune_model(gqa_model, evaluate=(str(held_out_file),), register="tiny", run_name="the run")
