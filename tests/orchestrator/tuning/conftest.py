"""Fixtures for tuning: a checkpoint that was pruned from the random model, and a call that tunes it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.progress import Reporter
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.tune import TuneResult, tune
from tests.orchestrator.conftest import PruneModel

Tune = Callable[..., TuneResult]


@pytest.fixture(scope="session")
def pruned(prune_model: PruneModel, gqa_model: Path) -> Path:
    """The random model without a third of its parameters."""
    output = prune_model(gqa_model, method="gram", sparsity=(0.33,)).output
    assert isinstance(output, Path)
    return output


@pytest.fixture(scope="session")
def tune_model(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Tune:
    """Tune a checkpoint for a few steps in this process, with a journal and no MLflow, unless told otherwise."""

    def run(checkpoint: Path = pruned, told: io.StringIO | None = None, **settings: Any) -> TuneResult:
        defaults = {"tracking_uri": "none", "local": True, "steps": 6, "batch_size": 4, "learning_rate": 0.01}
        defaults["patience"] = 100
        if settings.get("method") == "blocks":
            del defaults["steps"], defaults["batch_size"]
        output = tmp_path_factory.mktemp("tuned") / "tuned"
        config = TuneConfig(**{"checkpoint": str(checkpoint), "output": str(output), **defaults, **settings})
        return tune(config, Reporter(Console(file=told or io.StringIO(), width=400)))

    return run
