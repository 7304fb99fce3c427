"""Which settings a record has, and which `--resume` compares; named one by one, since a mistake would be silent."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.record.params import DIGESTED, OF_AN_ATTEMPT, PLACES, TOLD_OF_A_MODEL, run_params, what_is_asked

RESULT = {
    *("method", "sparsity", "refine", "ratio", "pruned_layers", "alpha", "keep_lowest"),
    *("uniform", "multiple_of", "no_bias", "drop_layers", "generate", "samples", "sequence_length", "seed"),
    *("keep_layers", "max_layer_sparsity", "uniform_heads", "heads_multiple_of", "for_tp"),
    *("evaluate_tokens", "tasks", "limit", "workers", "gpus_per_worker"),
}
VERSIONS = {f"{name}_version" for name in ("slimllm", "torch", "transformers", "ray", "mlflow", "datasets")}


@pytest.fixture(scope="module")
def config(gqa_model: Path, token_file: Path) -> PruneConfig:
    return PruneConfig(model=str(gqa_model), calibration=str(token_file), output="out", local=True)


@pytest.fixture(scope="module")
def inputs(config: PruneConfig) -> Inputs:
    return load_inputs(config, print)


def test_resume_compares_what_the_result_depends_on(config: PruneConfig, inputs: Inputs) -> None:
    digests = {"model_digest", "calibration_digest", "evaluate_digests"}
    commits = {"revision", "calibration_pinned", "evaluate_pinned"}
    assert what_is_asked(config, inputs).keys() == RESULT | digests | commits | VERSIONS


def test_resume_compares_the_files_of_tasks(config: PruneConfig, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine")
    tasks = {"tasks": ("mine",), "task_folder": str(tmp_path)}
    asked = what_is_asked(replace(config, **tasks), inputs)
    assert asked["lm_eval_version"]
    (tmp_path / "mine.yaml").write_text("task: other")
    assert what_is_asked(replace(config, **tasks), inputs)["task_digest"] != asked["task_digest"]


def test_every_setting_has_its_place() -> None:
    assert {"overwrite", "resume", "tracking_uri", "address", "local"} == OF_AN_ATTEMPT
    assert {"output", "experiment", "run_name", "register", "shared_storage", "offload", "weights_travel"} == PLACES
    assert {"model", "revision", "calibration", "evaluate", "moments", "task_folder"} == DIGESTED
    told = {"method", "refine", "ratio", "uniform", "uniform_heads", "no_bias", "keep_layers", "generate"}
    told |= {"model", "revision", "model_digest"}
    assert set(TOLD_OF_A_MODEL) == told


def test_parameters_leave_out_what_another_attempt_may_have(config: PruneConfig, inputs: Inputs) -> None:
    params = run_params(config, inputs, WorkerPlan(1, 1, 0.0, weights_travel=False))
    assert not params.keys() & OF_AN_ATTEMPT
    assert (params["output"], params["sparsity"]) == ("out", "0.2")
