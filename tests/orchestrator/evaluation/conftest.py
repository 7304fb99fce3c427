"""Fixtures for evaluations: a pruned model, a model of another architecture, and a call that evaluates."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from orchestrator.evaluation.config import EvaluateConfig
from orchestrator.evaluation.evaluate import Evaluation, evaluate
from orchestrator.progress import Reporter
from tests.orchestrator.conftest import PruneModel

Evaluate = Callable[..., Evaluation]


@pytest.fixture(scope="session")
def pruned(prune_model: PruneModel, gqa_model: Path) -> Path:
    output = prune_model(gqa_model).output
    assert isinstance(output, Path)
    return output


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that slimllm does not prune, with the vocabulary of the random models."""
    directory = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def evaluate_models(tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """Evaluate models in this process, with a journal and no MLflow, unless told otherwise."""

    def run(*models: Path, told: io.StringIO | None = None, **settings: Any) -> Evaluation:
        output = tmp_path_factory.mktemp("evaluation") / "out"
        defaults = {"tracking_uri": "none", "local": True, "output": str(output)}
        config = EvaluateConfig(models=tuple(map(str, models)), **{**defaults, **settings})
        return evaluate(config, Reporter(Console(file=told or io.StringIO(), width=400)))

    return run
