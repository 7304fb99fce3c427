"""Experiments that runs cannot use, or whose files they may not reach."""

from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from orchestrator.tracking import TrackingError, TrackingOptions, tracked_run
from orchestrator.tracking.server import Server


def test_a_deleted_experiment_is_refused_with_how_to_restore_it(uri: str, client: MlflowClient, journal: Path) -> None:
    name = f"deleted {uuid4()}"
    experiment_id = client.create_experiment(name)
    client.delete_experiment(experiment_id)
    options = TrackingOptions(tracking_uri=uri, experiment=name)
    said = rf"{name}.* was deleted: run `mlflow experiments restore --experiment-id {experiment_id}`.* --experiment$"
    with pytest.raises(TrackingError, match=said), tracked_run(options, journal):
        pytest.fail("the run began")
    assert not journal.exists()
    client.restore_experiment(experiment_id)
    with tracked_run(options, journal) as run:
        assert run.experiment_id == experiment_id


@pytest.mark.parametrize(
    ("uri", "place", "warned"),
    [
        ("http://tracking.example:5000", "file:///mlruns/1", True),
        ("https://tracking.example", "/mlruns/1", True),
        ("https://tracking.example", "mlflow-artifacts:/1", False),
        ("https://tracking.example", "s3://bucket/1", False),
        ("http://127.0.0.1:5000", "/mlruns/1", False),
        ("sqlite:////tmp/mlflow.db", "file:///mlruns/1", False),
    ],
)
def test_files_that_a_far_server_keeps_in_its_own_folder_are_warned_of(uri: str, place: str, warned: bool) -> None:
    told: list[str] = []
    server = Server(TrackingOptions(tracking_uri=uri), told.append)
    found = SimpleNamespace(name="e", experiment_id="1", lifecycle_stage="active", artifact_location=place)
    # A server on another machine is nothing that starts in seconds.
    server.client = SimpleNamespace(get_experiment_by_name=lambda name: found)
    assert server._find_experiment(None) == "1"
    assert [place in line and "--experiment" in line for line in told] == [True] * warned
