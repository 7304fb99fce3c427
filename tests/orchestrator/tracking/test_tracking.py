"""Runs with a real SQLite store and a real MLflow server; no part of MLflow is mocked."""

import os
import signal
import time

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from sqlalchemy import event
from sqlalchemy.engine import Engine

from orchestrator.tracking import TrackingError, TrackingOptions, stored_run, tracked_run
from orchestrator.tracking.reach import QUICK_SECONDS
from tests.orchestrator.tracked import assert_everything_logged, events_of, files_of, log_everything, steps_of


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    before = dict(os.environ)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def test_a_first_run_prints_nothing_and_mlflow_is_imported_late(first_run):
    folder, printed = first_run
    assert printed == ""
    kinds = [event["event"] for event in events_of(folder / "metrics.jsonl")]
    assert kinds == ["start", "stored", "params", "end", "logged"]


def test_a_run_holds_what_was_logged(uri, client, journal, checkpoint, capfd):
    options = TrackingOptions(experiment="everything", tracking_uri=uri, run_name="named")
    with tracked_run(options, journal) as run:
        log_everything(run, files=checkpoint)
        assert client.get_run(run.run_id).info.status == "RUNNING"
    assert_everything_logged(client, run.run_id)
    stored = client.get_run(run.run_id)
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "named")
    assert (run.tracking_uri, run.experiment_id) == (uri, stored.info.experiment_id)
    assert client.get_experiment(run.experiment_id).name == "everything"
    listed = [file.path for file in client.list_artifacts(run.run_id, "pruning")]
    assert listed == ["pruning/model.safetensors", "pruning/nested"]
    assert capfd.readouterr() == ("", "")


def test_nothing_global_is_set(uri, journal):
    before = mlflow.get_tracking_uri()
    with tracked_run(TrackingOptions(tracking_uri=uri), journal):
        assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before


def test_artifacts_lie_beside_the_database(uri, client, journal, checkpoint, tmp_path, monkeypatch, first_run):
    monkeypatch.chdir(tmp_path)
    with tracked_run(TrackingOptions(experiment="a b/c", tracking_uri=uri), journal) as run:
        run.log_artifacts(checkpoint, to="files")
    assert list(first_run[0].glob("mlruns/a%20b%2Fc/*/artifacts/files/model.safetensors"))
    assert not (tmp_path / "mlruns").exists()


def test_system_metrics_are_sampled(uri, client, journal, monkeypatch):
    monkeypatch.setattr(stored_run, "SAMPLING_SECONDS", 0.1)
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            history = client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
            if len(history) >= 2:
                break
            time.sleep(0.1)
    steps = [metric.step for metric in history]
    assert steps == sorted(set(steps))
    assert client.get_run(run.run_id).data.metrics["system/system_memory_usage_megabytes"] > 0


def test_infinity_and_nan_stay_in_the_journal(uri, client, journal):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        run.log_metrics({"a": float("inf"), "b": float("-inf"), "c": float("nan"), "d": 1}, step=3)
    assert client.get_run(run.run_id).data.metrics == {"d": 1.0}
    assert events_of(journal)[2]["metrics"] == {"a": "inf", "b": "-inf", "c": None, "d": 1.0}


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_a_run_ends_as_the_code_inside_ended(uri, client, journal, error, status):
    with pytest.raises(type(error)), tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        raise error
    stored = client.get_run(run.run_id).info
    assert stored.status == status
    assert stored.end_time >= stored.start_time
    assert events_of(journal)[-1]["status"] == status


def test_a_run_whose_folder_is_gone_still_ends(uri, client, journal):
    runs = []

    def lose_the_folder():
        with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
            runs.append(run)
            journal.parent.rename(journal.parent.with_name("gone"))
            raise RuntimeError("the first error")

    with pytest.raises(RuntimeError, match="the first error"):
        lose_the_folder()
    assert client.get_run(runs[0].run_id).info.status == "FAILED"


def test_a_registered_checkpoint_comes_back_byte_for_byte(uri, client, journal, checkpoint):
    options = TrackingOptions(tracking_uri=uri, register="tiny-pruned")
    with tracked_run(options, journal) as run:
        run.log_metrics({"perplexity": 7.5})
        run.log_metrics({"perplexity": 7.0})
        run.log_metrics({"heads_kept": 3}, step=1)
        address = run.log_checkpoint(checkpoint, "Llama-3.1", {"sparsity": 0.2})
        second = run.log_checkpoint(checkpoint, "Llama-3.1", {"sparsity": 0.2})
        run.log_metrics({"speedup": 1.5})
    assert (address, second) == ("models:/tiny-pruned/1", "models:/tiny-pruned/2")
    mlflow.set_tracking_uri(uri)
    try:
        downloaded = files_of(mlflow.artifacts.download_artifacts(address))
    finally:
        mlflow.set_tracking_uri(None)
    assert downloaded == files_of(checkpoint)
    stored = client.get_run(run.run_id)
    models = [client.get_logged_model(output.model_id) for output in stored.outputs.model_outputs]
    first, last = sorted(models, key=lambda model: model.creation_timestamp)
    assert (first.name, first.status, first.params) == ("Llama-3-1", "READY", {"sparsity": "0.2"})
    assert {m.key: m.value for m in first.metrics} == {"perplexity": 7.0}
    assert {m.key: m.value for m in last.metrics} == {"perplexity": 7.0, "speedup": 1.5}
    assert steps_of(client, run.run_id, "perplexity") == [(0, 7.5), (0, 7.0)]
    assert client.get_model_version("tiny-pruned", "1").run_id == run.run_id


def test_a_version_has_tags_a_description_and_an_alias_as_mlflow_takes_it(uri, client, journal, checkpoint):
    with tracked_run(TrackingOptions(tracking_uri=uri, register="aliased-once"), journal) as run:
        told = {"measured": {"perplexity": 7.0}, "alias": "ratio-0.25 x", "description": "in a line"}
        run.log_checkpoint(checkpoint, "tiny", {"method": "gram"}, **told)
    # Letters, digits, dashes and underscores.
    version = client.get_model_version_by_alias("aliased-once", "ratio-0-25-x")
    assert (version.run_id, version.description) == (run.run_id, "in a line")
    assert version.tags == {"method": "gram", "perplexity": "7.0"}


def test_a_run_has_a_description(uri, client, journal):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        run.log_note("first")
        run.log_note("| a | table |")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "| a | table |"


def test_a_checkpoint_that_is_not_registered_has_an_address(uri, client, journal, checkpoint):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        address = run.log_checkpoint(checkpoint, "tiny", {})
        with pytest.raises(NotADirectoryError):
            run.log_checkpoint(checkpoint / "missing", "tiny", {})
    assert address.startswith("models:/m-")
    assert client.get_logged_model(address.removeprefix("models:/")).source_run_id == run.run_id


def test_children_are_nested_and_end_on_their_own(uri, client, journal, tmp_path):
    with tracked_run(TrackingOptions(tracking_uri=uri, run_name="sweep"), journal) as sweep:
        with sweep.child("0.2") as kept:
            kept.log_metrics({"perplexity": 7})
        with pytest.raises(RuntimeError), sweep.child("0.5", tmp_path / "own" / "metrics.jsonl") as failed:
            raise RuntimeError
        sweep.log_params({"children": 2})
    for child, name, status in ((kept, "0.2", "FINISHED"), (failed, "0.5", "FAILED")):
        stored = client.get_run(child.run_id)
        assert stored.data.tags["mlflow.parentRunId"] == sweep.run_id
        assert (stored.info.run_name, stored.info.status) == (name, status)
    assert client.get_run(sweep.run_id).info.status == "FINISHED"
    kinds = [(event.get("child"), event["event"]) for event in events_of(journal)]
    inner = [("0.2", kind) for kind in ("start", "stored", "metrics", "end", "logged")]
    rest = [(None, kind) for kind in ("child", "params", "end", "logged")]
    assert kinds == [(None, "start"), (None, "stored"), *inner, *rest]
    own = events_of(tmp_path / "own" / "metrics.jsonl")
    assert [event["event"] for event in own] == ["start", "stored", "end"]


def test_a_refused_call_costs_that_call_only(uri, client, journal):
    warnings = []
    with tracked_run(TrackingOptions(tracking_uri=uri), journal, warn=warnings.append) as run:
        run.log_params({"seed": 1})
        run.log_params({"seed": 2})
        run.log_metrics({"perplexity": 7})
    assert len(warnings) == 1
    assert "refused" in warnings[0]
    stored = client.get_run(run.run_id)
    assert (stored.data.params, stored.data.metrics) == ({"seed": "1"}, {"perplexity": 7.0})


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "swallows"])
def test_a_server_that_does_not_answer_costs_one_warning(
    journal, checkpoint, free_port, listens, capsys, caplog, monkeypatch
):
    port, sock = free_port
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    if listens:
        sock.listen(5)
    begun = time.monotonic()
    with tracked_run(TrackingOptions(tracking_uri=f"http://user:secret@127.0.0.1:{port}"), journal) as run:
        log_everything(run, files=checkpoint)
        assert run.log_checkpoint(checkpoint, "tiny", {}) is None
        with run.child("inner") as child:
            child.log_metrics({"perplexity": 7})
    assert time.monotonic() - begun < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert caplog.records == []
    assert f"127.0.0.1:{port} does not answer" in line
    assert "secret" not in line
    assert (run.run_id, run.experiment_id, run.tracking_uri) == (None, None, None)
    kinds = [event["event"] for event in events_of(journal)]
    record = ["params", *["metrics"] * 4, "dataset", "artifacts", "checkpoint"]
    assert kinds == ["start", *record, "start", "metrics", "end", "end"]
    assert "secret" not in journal.read_text()


@pytest.mark.parametrize(
    "bad",
    [
        "file:mlruns",
        "mlruns",
        "gopher://host",
        "http://",
        "http://host:port",
        "sqlite:////proc/none/mlflow.db",
    ],
)
def test_an_unusable_uri_is_an_error_at_once(journal, bad):
    begun = time.monotonic()
    with pytest.raises(TrackingError, match="cannot be used") as caught:  # noqa: SIM117
        with tracked_run(TrackingOptions(tracking_uri=bad), journal):
            pytest.fail("the run began")
    assert time.monotonic() - begun < 5
    assert "\n" not in str(caught.value)
    assert not journal.exists()


def test_a_file_that_is_no_database_is_an_error_at_once(journal, tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, and longer than the hundred bytes of a header" * 2)
    begun = time.monotonic()
    with pytest.raises(TrackingError, match="not a database"):  # noqa: SIM117
        with tracked_run(TrackingOptions(tracking_uri=f"sqlite:///{tmp_path / 'notes.txt'}"), journal):
            pytest.fail("the run began")
    assert time.monotonic() - begun < 5


def test_options_are_checked_and_the_uri_has_a_default(tmp_path, monkeypatch):
    with pytest.raises(TrackingError, match="without '/'"):
        TrackingOptions(register="org/model")
    monkeypatch.chdir(tmp_path)
    assert TrackingOptions().resolved_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert TrackingOptions().resolved_uri == "http://host"
    assert TrackingOptions(tracking_uri="http://other").resolved_uri == "http://other"


def test_the_users_own_limits_hold(uri, journal, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        run.log_artifacts(journal.parent)
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


def test_a_server_that_dies_costs_one_warning_and_nothing_of_the_run(server, other_store, journal, checkpoint, capfd):
    process, address, store = server.process, server.address, server.store
    warnings = []
    options = TrackingOptions(experiment="served", tracking_uri=address, register="served")
    with tracked_run(options, journal, warn=warnings.append) as run:
        run.log_metrics({"perplexity": 7.25})
        assert run.log_checkpoint(checkpoint, "tiny", {}) == "models:/served/1"
        run.log_artifacts(checkpoint, to="files")
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == QUICK_SECONDS
        with run.child("inner"):
            pass
        assert warnings == []
        assert capfd.readouterr() == ("", "")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        begun = time.monotonic()
        run.log_params({"late": 1})
        run.log_metrics({"speedup": 1.5})
        run_id = run.run_id
    assert time.monotonic() - begun < 10
    assert len(warnings) == 1

    served = MlflowClient(tracking_uri=store)
    (output,) = served.get_run(run_id).outputs.model_outputs
    model = served.get_logged_model(output.model_id)
    assert [(metric.key, metric.value) for metric in model.metrics] == [("perplexity", 7.25)]
    uploaded = list((other_store / "artifacts").rglob("model.safetensors"))
    assert [file.read_bytes() for file in uploaded] == [(checkpoint / "model.safetensors").read_bytes()] * 2


def test_mlflow_takes_the_same_metric_twice_as_one(uri, client, journal):
    """What linking metrics with a model relies on."""
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        for _ in range(2):
            client.log_batch(run.run_id, metrics=[Metric("same", 1.0, 1000, 0)])
    assert steps_of(client, run.run_id, "same") == [(0, 1.0)]


def test_a_signal_in_the_middle_of_a_transaction_waits_for_its_end_and_the_run_is_killed(uri, client, journal):
    class Terminated(SystemExit): ...

    def terminate(signum, frame):
        raise Terminated

    def send(connection, cursor, statement, *others):
        if statement.startswith("INSERT INTO metrics") and not sent:
            sent.append(statement)
            signal.raise_signal(signal.SIGTERM)

    sent: list[str] = []
    warnings: list[str] = []
    before = signal.signal(signal.SIGTERM, terminate)
    event.listen(Engine, "after_cursor_execute", send)
    try:
        with tracked_run(TrackingOptions(tracking_uri=uri), journal, warnings.append) as run:
            run.log_metrics({"heads_kept": 3.0}, step=0)
        pytest.fail("the signal was lost")
    except Terminated:
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        event.remove(Engine, "after_cursor_execute", send)
        signal.signal(signal.SIGTERM, before)
    assert sent
    assert warnings == []
    assert client.get_run(run.run_id).info.status == "KILLED"
    assert steps_of(client, run.run_id, "heads_kept") == [(0, 3.0)]
