"""A training in MLflow: a child of its pruning run, with curves, data, totals and a registered checkpoint."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.pipeline import PruneResult
from orchestrator.tracking import log_output
from orchestrator.tuning.tune import TuneResult
from tests.orchestrator.tuning.conftest import Tune

PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def tracked(gqa_run: PruneResult, tune_model: Tune, tracking_uri: str, held_out_file: Path) -> TuneResult:
    assert isinstance(gqa_run.output, Path)
    places = {"tracking_uri": tracking_uri, "register": "tiny", "evaluate": (str(held_out_file),)}
    return tune_model(gqa_run.output, keep_worse=True, **places)


def test_the_run_is_nested_in_that_of_the_pruning(tracked: TuneResult, gqa_run: PruneResult, tracking_uri: str) -> None:
    run = MlflowClient(tracking_uri=tracking_uri).get_run(str(tracked.run_id))
    assert run.data.tags[PARENT] == gqa_run.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["method"] == "distil"
    contexts = sorted(tag.value for one in run.inputs.dataset_inputs for tag in one.tags if "context" in tag.key)
    assert contexts == ["evaluation", "training", "validation"]


def test_it_has_curves_and_totals(tracked: TuneResult, tracking_uri: str) -> None:
    client, run_id, totals = MlflowClient(tracking_uri=tracking_uri), str(tracked.run_id), tracked.totals
    assert totals is not None
    for name in ("loss", "learning_rate", "tokens_per_second"):
        assert [one.step for one in client.get_metric_history(run_id, name)] == [1, 2, 3, 4, 5, 6]
    history = client.get_metric_history(run_id, "validation_loss")
    assert history[0].step == 0
    assert history[0].value == pytest.approx(totals.loss_before)
    metrics = client.get_run(run_id).data.metrics
    assert metrics["loss_after"] == pytest.approx(totals.loss_after)
    assert metrics["perplexity_after"] == pytest.approx(next(iter(totals.perplexity.values()))[2])


def test_the_checkpoint_is_the_next_version(tracked: TuneResult, gqa_run: PruneResult, tracking_uri: str) -> None:
    earlier, later = (str(uri).rpartition("/")[2] for uri in (gqa_run.model_uri, tracked.model_uri))
    assert int(later) > int(earlier)
    version = MlflowClient(tracking_uri=tracking_uri).get_model_version_by_alias("tiny", "tuned")
    assert str(version.version) == later
    assert "tuned with distil" in version.description


def test_without_its_store_it_is_a_run_of_its_own_and_is_logged_later(
    gqa_run: PruneResult, tune_model: Tune, other_store: Path
) -> None:
    assert isinstance(gqa_run.output, Path)
    result = tune_model(gqa_run.output)
    assert isinstance(result.output, Path)
    assert result.run_id is None
    uri = f"sqlite:///{other_store / 'mlflow.db'}"
    logged = log_output(result.output, tracking_uri=uri)
    run = MlflowClient(tracking_uri=uri).get_run(logged.run_id)
    assert PARENT not in run.data.tags
    assert run.data.metrics["steps"] == 6
