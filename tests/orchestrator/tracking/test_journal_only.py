"""`--tracking-uri none` records a run in its journal only, and MLflow can be updated from it later."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from rich.console import Console

from orchestrator import PruneConfig
from orchestrator.cli import main
from orchestrator.cli.summary import print_summary
from orchestrator.pipeline import PruneResult, prune
from orchestrator.tracking import TrackingError, TrackingOptions, how_to_log, log_output, tracked_run
from orchestrator.tracking.reach import reach_store
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.tracked import assert_everything_logged, events_of, log_everything

# The whole life of a run, with a model and a child, in a process that has imported nothing of MLflow.
WITHOUT_MLFLOW = """
import sys
from pathlib import Path
from orchestrator.tracking import TrackingOptions, how_to_log, tracked_run
folder = Path(sys.argv[1])
options = TrackingOptions(tracking_uri="none", experiment="later", run_name="by journal")
with tracked_run(options, folder / "pruning" / "metrics.jsonl") as run:
    run.log_params({"seed": 7})
    run.log_metrics({"perplexity": 7.25})
    run.log_note("a note")
    (folder / "model.safetensors").write_bytes(b"weights")
    assert run.log_checkpoint(folder, "tiny", {"sparsity": 0.2}) is None
    with run.child("inner") as child:
        child.log_metrics({"heads_kept": 3}, step=0)
    assert (run.run_id, child.run_id, run.experiment_id) == (None, None, None)
print(how_to_log(folder))
assert not [name for name in sys.modules if name.partition(".")[0] in ("mlflow", "ray")]
"""


@pytest.fixture(scope="module")
def run(prune_model: PruneModel, gqa_model: Path) -> PruneResult:
    return prune_model(gqa_model, tracking_uri="none", run_name="unseen", experiment="unseen")


def slimllm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_mlflow_is_not_imported_and_the_journal_is_written_as_always(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WITHOUT_MLFLOW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"slimllm log {tmp_path} --tracking-uri URI"
    events = events_of(tmp_path / "pruning" / "metrics.jsonl")
    record = ["start", "params", "metrics", "note", "checkpoint", "start", "metrics", "end", "end"]
    assert [event["event"] for event in events] == record
    assert [event["uri"] for event in events if event["event"] == "start"] == ["none", "none"]
    logged = log_output(tmp_path, tracking_uri=uri)
    assert not logged.before
    assert client.get_run(logged.run_id).info.run_name == "by journal"
    assert client.get_experiment(logged.experiment_id).name == "later"


def test_everything_can_be_logged_later(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    journal = tmp_path / "pruning" / "metrics.jsonl"
    with tracked_run(TrackingOptions(tracking_uri="none", experiment="all of it later"), journal) as run:
        log_everything(run, files=journal.parent)
        assert run.tracking_uri == "none"
    first = slimllm("log", tmp_path, "--tracking-uri", uri, "--json")
    assert first.exit_code == 0, first.output
    logged = json.loads(first.stdout)
    assert_everything_logged(client, logged["run_id"])
    assert [file.path for file in client.list_artifacts(logged["run_id"], "pruning")] == ["pruning/metrics.jsonl"]
    assert log_output(tmp_path, tracking_uri=uri).before
    assert how_to_log(tmp_path) is None


def test_a_real_run_says_that_mlflow_was_not_used_and_how_to_log_it(
    run: PruneResult, uri: str, client: MlflowClient
) -> None:
    (model,) = run.models
    assert (run.run_id, run.experiment_id, run.tracking_uri) == (None, None, "none")
    assert (model.run_id, model.model_uri) == (None, None)
    assert run.log_command == f"slimllm log {run.output} --tracking-uri URI"
    said = io.StringIO()
    print_summary(run, Console(file=said, width=300))
    lines = said.getvalue().splitlines()
    assert lines[-2:] == ["MLflow was not used; to log this run later, run", run.log_command]
    logged = log_output(Path(run.output), tracking_uri=uri)
    stored = client.get_run(logged.run_id)
    assert (stored.info.run_name, stored.info.status) == ("unseen", "FINISHED")
    assert stored.data.params["method"] == "slimllm"
    (output,) = stored.outputs.model_outputs
    assert client.get_logged_model(output.model_id).status == "READY"


def test_the_variable_means_the_same(monkeypatch: pytest.MonkeyPatch, journal: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    with tracked_run(TrackingOptions(), journal) as run:
        assert run.run_id is None
    assert [event["event"] for event in events_of(journal)] == ["start", "end"]
    assert not TrackingOptions(tracking_uri="sqlite:///mlflow.db").journal_only


def test_a_registered_model_needs_mlflow(gqa_model: Path, token_file: Path, tmp_path: Path) -> None:
    config = PruneConfig(
        model=str(gqa_model),
        calibration=str(token_file),
        output=str(tmp_path / "out"),
        tracking_uri="none",
        register="tiny",
        local=True,
    )
    with pytest.raises(TrackingError, match="register"):
        prune(config)
    result = slimllm("prune", gqa_model, "--tracking-uri", "none", "--register", "tiny")
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert "--register" in line
    assert "--tracking-uri none" in line


def test_nothing_is_logged_later_to_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    journal = tmp_path / "pruning" / "metrics.jsonl"
    with tracked_run(TrackingOptions(tracking_uri="none"), journal):
        pass
    for arguments in (["--tracking-uri", "none"], ["--register", "tiny"]):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
        result = slimllm("log", tmp_path, *arguments)
        assert result.exit_code == 2
        (line,) = result.output.splitlines()
        assert "--tracking-uri with a store" in line


def test_the_doctor_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach_store(TrackingOptions(tracking_uri="none")) == "none: only the journal"
