"""A run's output contains its settings, and running them again gives the same bytes."""

import io
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from rich.console import Console

from orchestrator import PruneConfig
from orchestrator.cli import main
from orchestrator.config import read_config_file
from orchestrator.pipeline import calibrate
from orchestrator.progress import Reporter
from orchestrator.record.params import OF_AN_ATTEMPT, PLACES
from tests.conftest import content
from tests.orchestrator.conftest import PruneModel

CASES: dict[str, dict[str, Any]] = {
    "slimllm": {"ratio": 0.3, "alpha": 3.0, "keep_lowest": 0.0, "keep_layers": (0, -3), "max_layer_sparsity": 0.8},
    "gram": {"method": "gram", "sparsity": (0.2, 0.4), "multiple_of": 4, "no_bias": True},
}
# Given, so that what is noted of them is the same: the file has what was settled, where nothing was given.
WORKERS: dict[str, Any] = {"workers": 2, "gpus_per_worker": 0.0}


@pytest.mark.parametrize("method", CASES)
def test_a_run_is_repeated_from_its_file_to_the_same_bytes(
    method: str, prune_model: PruneModel, gqa_model: Path, held_out_file: Path, tmp_path: Path
) -> None:
    evaluate = (str(held_out_file),)
    first = prune_model(gqa_model, rendered=True, evaluate=evaluate, **CASES[method], **WORKERS)
    run_file = first.output / "pruning" / "run.toml"
    words = ["prune", "--config", str(run_file), "--output", str(tmp_path / "again")]
    words += ["--local", "--tracking-uri", "none"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "again") == content(first.output)


def test_it_has_every_setting_that_the_result_depends_on_and_says_of_what(
    prune_model: PruneModel, gqa_model: Path, token_file: Path, tracking_uri: str
) -> None:
    run = prune_model(gqa_model, method="gram", tracking_uri=tracking_uri)
    run_file = run.output / "pruning" / "run.toml"
    settings = read_config_file(run_file)
    asked = {field.name for field in fields(PruneConfig)} - OF_AN_ATTEMPT - PLACES
    # What was not given and has no default stays out.
    unasked = {"moments", "ratio", "pruned_layers", "alpha", "revision", "evaluate_tokens", "max_layer_sparsity"}
    unasked |= {"task_folder", "limit"}
    assert asked - settings.keys() == unasked
    assert settings["workers"] >= 1
    assert settings["sparsity"] == (0.33,)
    assert settings["calibration"] == str(token_file)
    header = [line for line in run_file.read_text().splitlines() if line.startswith("#")]
    assert header[0] == "# to repeat this run: slimllm prune --config run.toml --output DIR"
    digests = MlflowClient(tracking_uri).get_run(str(run.run_id)).data.params
    assert digests["model_digest"] in header[1]
    assert digests["calibration_digest"] in header[2]
    assert "torch " in header[3]


def test_mlflow_has_it_too(prune_model: PruneModel, gqa_model: Path, tracking_uri: str) -> None:
    run = prune_model(gqa_model, method="gram", sparsity=(0.2, 0.4), tracking_uri=tracking_uri)
    files = MlflowClient(tracking_uri).list_artifacts(str(run.run_id), "pruning")
    assert "pruning/run.toml" in [file.path for file in files]


def test_moments_keep_theirs_and_stand_for_the_data_they_rest_on(
    prune_model: PruneModel, gqa_model: Path, token_file: Path, tmp_path: Path
) -> None:
    config = PruneConfig(
        model=str(gqa_model), method="gram", calibration=str(token_file), local=True, output=str(tmp_path / "moments")
    )
    moments = calibrate(config, Reporter(Console(file=io.StringIO())))
    assert "slimllm calibrate --config" in (moments / "pruning" / "run.toml").read_text()
    run = prune_model(gqa_model, method="gram", moments=str(moments), calibration=None)
    settings = tomllib.loads((run.output / "pruning" / "run.toml").read_text())
    assert settings["moments"] == str(moments)
    assert "calibration" not in settings
    assert PruneConfig(**read_config_file(run.output / "pruning" / "run.toml")).moments == str(moments)
