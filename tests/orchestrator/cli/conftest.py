"""Fixtures for tests of bad input: the command line, a model to break, and the last run in MLflow."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.orchestrator.cli.broken_inputs import Cli


@pytest.fixture
def cli(tmp_path: Path, tracking_uri: str) -> Cli:
    return Cli(tmp_path, tracking_uri)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a run that gets as far as Ray, with something else than a line for the user."""

    def session(*arguments: object) -> None:
        raise AssertionError("Ray was reached")

    monkeypatch.setattr("cluster.session.session", session)


@pytest.fixture
def model(gqa_model: Path, tmp_path: Path) -> Path:
    """A copy of the model with a tokenizer of words, to break."""
    copy = tmp_path / "model"
    shutil.copytree(gqa_model, copy)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(copy)
    return copy


@pytest.fixture
def last_run(tracking_uri: str) -> Callable[[], Any]:
    def find() -> Any:
        client = MlflowClient(tracking_uri)
        experiment = client.get_experiment_by_name("slimllm")
        return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]

    return find
