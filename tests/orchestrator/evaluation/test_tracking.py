"""An evaluation in MLflow: a run with a child for each model, and the figures on the pruned model's run and version."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.evaluation.evaluate import Evaluation
from orchestrator.pipeline import PruneResult
from tests.orchestrator.evaluation.conftest import Evaluate


@pytest.fixture(scope="module")
def tracked(
    evaluate_models: Evaluate, gqa_model: Path, gqa_run: PruneResult, held_out_file: Path, tracking_uri: str
) -> Evaluation:
    assert isinstance(gqa_run.output, Path)
    return evaluate_models(gqa_model, gqa_run.output, data=(str(held_out_file),), tracking_uri=tracking_uri)


def test_each_model_has_a_run(tracked: Evaluation, tracking_uri: str) -> None:
    client = MlflowClient(tracking_uri=tracking_uri)
    run = client.get_run(str(tracked.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.params["model_digests"] == ", ".join(one.digest for one in tracked.models)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {
        "evaluation.json",
        "evaluation.md",
        "run.toml",
    }
    children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    found = {child.info.run_name: child.data.metrics for child in children}
    for model in tracked.models:
        assert found[model.name]["perplexity/held-out.parquet/16"] == pytest.approx(model.texts[0].perplexity)


def test_the_pruning_s_run_its_model_and_its_version_have_the_figures(
    tracked: Evaluation, gqa_run: PruneResult, tracking_uri: str
) -> None:
    client, expected = MlflowClient(tracking_uri=tracking_uri), tracked.models[1].texts[0]
    name = "evaluation/perplexity/held-out.parquet/16"
    assert client.get_run(str(gqa_run.run_id)).data.metrics[name] == pytest.approx(expected.perplexity)
    version = client.get_model_version("tiny", str(gqa_run.model_uri).rpartition("/")[2])
    assert float(version.tags[name]) == pytest.approx(expected.perplexity, rel=1e-3)
    model = client.get_logged_model(client.get_run(str(gqa_run.run_id)).outputs.model_outputs[0].model_id)
    assert {one.key: one.value for one in model.metrics}[name] == pytest.approx(expected.perplexity)
