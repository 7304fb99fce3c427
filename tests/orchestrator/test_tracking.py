"""Runs against a real SQLite store and a real MLflow server; nothing of MLflow is replaced."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from orchestrator.tracking import TrackingError, TrackingOptions, replay, tracked_run
from orchestrator.tracking import store as mlflow_store

FIRST_RUN = """
import sys
from pathlib import Path
from orchestrator.tracking import TrackingOptions, tracked_run
assert "mlflow" not in sys.modules, "importing the module imports mlflow: every --help waits for it"
with tracked_run(TrackingOptions(tracking_uri=sys.argv[1]), Path(sys.argv[2])) as run:
    run.log_params({"first": True})
"""

# The app of `mlflow server` in one process: the command itself starts nine and takes half a minute.
SERVER = """
import os, sys
import mlflow.server as server
os.environ[server.BACKEND_STORE_URI_ENV_VAR] = os.environ[server.REGISTRY_STORE_URI_ENV_VAR] = sys.argv[1]
os.environ[server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
os.environ[server.SERVE_ARTIFACTS_ENV_VAR] = "true"
os.environ[server.ARTIFACTS_DESTINATION_ENV_VAR] = sys.argv[2]
server.app.run(host="127.0.0.1", port=int(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    before = dict(os.environ)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A new store, migrated by a run in a process of its own; its folder and what that process printed."""
    folder = tmp_path_factory.mktemp("store")
    arguments = [f"sqlite:///{folder / 'mlflow.db'}", str(folder / "metrics.jsonl")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-c", FIRST_RUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def uri(first_run):
    return f"sqlite:///{first_run[0] / 'mlflow.db'}"


@pytest.fixture
def client(uri):
    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "pruning" / "metrics.jsonl"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(1 << 18))
    (folder / "nested" / "config.json").write_text("{}")
    return folder


def log_everything(run, files=None):
    run.log_params({"sparsity": 0.2, "model": Path("a/b"), "ratios": np.array([1, 2]), "none": None})
    for layer in range(3):
        run.log_metrics({"heads_kept": np.int64(8 - layer), "channels_kept": 100.0 + layer}, step=layer)
    run.log_metrics({"perplexity": 7.25})
    run.log_dataset("wikitext", "ab" * 32, "calibration", "train.txt", n_blocks=4, block_length=16)
    if files:
        run.log_artifacts(files, "pruning")


def events_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(client, run_id, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def assert_everything_logged(client, run_id):
    run = client.get_run(run_id)
    assert run.data.params == {"sparsity": "0.2", "model": "a/b", "ratios": "[1, 2]", "none": "None"}
    assert steps_of(client, run_id, "heads_kept") == [(0, 8.0), (1, 7.0), (2, 6.0)]
    assert steps_of(client, run_id, "perplexity") == [(0, 7.25)]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("wikitext", ("ab" * 32)[:36])
    assert json.loads(dataset.dataset.source) == {"source": "train.txt", "digest": "ab" * 32}
    assert json.loads(dataset.dataset.profile) == {"num_rows": 4, "num_elements": 64, "block_length": 16}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "calibration")]


def test_a_first_run_prints_nothing_and_mlflow_is_imported_late(first_run):
    folder, printed = first_run
    assert printed == ""
    assert [event["event"] for event in events_of(folder / "metrics.jsonl")] == ["start", "params", "end"]


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
        run.log_artifacts(checkpoint, "files")
    assert list(first_run[0].glob("mlruns/a%20b%2Fc/*/artifacts/files/model.safetensors"))
    assert not (tmp_path / "mlruns").exists()


def test_system_metrics_are_sampled(uri, client, journal, monkeypatch):
    monkeypatch.setattr(mlflow_store, "SAMPLING_SECONDS", 0.1)
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            history = client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
            if len(history) >= 2:
                break
            time.sleep(0.1)
    assert [metric.step for metric in history[:2]] == [0, 1]
    assert client.get_run(run.run_id).data.metrics["system/system_memory_usage_megabytes"] > 0


def test_infinity_and_nan_stay_in_the_journal(uri, client, journal):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        run.log_metrics({"a": float("inf"), "b": float("-inf"), "c": float("nan"), "d": 1}, step=3)
    assert client.get_run(run.run_id).data.metrics == {"d": 1.0}
    assert events_of(journal)[1]["metrics"] == {"a": "inf", "b": "-inf", "c": None, "d": 1.0}


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
    assert [event.get("child") for event in events_of(journal)] == [None, "0.2", "0.2", "0.2", None, None]
    assert [event["event"] for event in events_of(tmp_path / "own" / "metrics.jsonl")] == ["start", "end"]
    again = client.get_run(replay(tmp_path / "own" / "metrics.jsonl", TrackingOptions(tracking_uri=uri)))
    assert (again.info.run_name, again.info.status) == ("0.5", "FAILED")


def test_a_journal_moves_with_its_folder(uri, journal):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        run.log_params({"before": 1})
        moved = journal.parent.rename(journal.parent.with_name("moved")) / journal.name
        run.move_journal(moved)
        run.log_params({"after": 1})
    assert [event["event"] for event in events_of(moved)] == ["start", "params", "params", "end"]
    assert not journal.exists()


def test_a_replay_gives_the_run_again(uri, client, journal):
    options = TrackingOptions(tracking_uri=uri, run_name="first")
    with suppress(RuntimeError), tracked_run(options, journal) as run:
        log_everything(run)
        with run.child("inner") as child:
            child.log_metrics({"perplexity": 9}, step=5)
        raise RuntimeError
    again = replay(journal, TrackingOptions(tracking_uri=uri))
    assert again != run.run_id
    assert_everything_logged(client, again)
    first, second = client.get_run(run.run_id).info, client.get_run(again).info
    assert (second.status, second.run_name) == ("FAILED", "first")
    assert (second.start_time, second.end_time) == (first.start_time, first.end_time)
    times = [[m.timestamp for m in client.get_metric_history(i, "heads_kept")] for i in (run.run_id, again)]
    assert times[0] == times[1]
    (inner,) = client.search_runs([run.experiment_id], f"tags.mlflow.parentRunId = '{again}'")
    assert (inner.info.run_name, inner.info.status) == ("inner", "FINISHED")
    assert steps_of(client, inner.info.run_id, "perplexity") == [(5, 9.0)]


def test_a_replay_of_attempts_is_one_run(uri, client, journal):
    options = TrackingOptions(tracking_uri=uri)
    with suppress(KeyboardInterrupt), tracked_run(options, journal) as run:
        run.log_params({"workers": 1, "seed": 7})
        run.log_metrics({"heads_kept": 8}, step=0)
        raise KeyboardInterrupt
    with tracked_run(options, journal) as run:
        run.log_params({"workers": 2})
        run.log_metrics({"heads_kept": 7}, step=1)
    stored = client.get_run(replay(journal, TrackingOptions(tracking_uri=uri, run_name="renamed")))
    assert stored.data.params == {"workers": "2", "seed": "7"}
    assert steps_of(client, stored.info.run_id, "heads_kept") == [(0, 8.0), (1, 7.0)]
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "renamed")


def test_a_replay_that_fails_leaves_no_run_running(uri, client, journal):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        run.log_metrics({"a\nb": 1})
    with pytest.raises(ConnectionError, match="failed"):
        replay(journal, TrackingOptions(tracking_uri=uri, run_name="half"))
    (half,) = client.search_runs([run.experiment_id], "attributes.run_name = 'half'")
    assert half.info.status == "FAILED"


def test_a_journal_cut_short_is_a_killed_run(uri, client, journal):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        run.log_metrics({"heads_kept": 8}, step=0)
    journal.write_text("\n".join(journal.read_text().splitlines()[:2]) + '\n{"event": "met')
    stored = client.get_run(replay(journal, TrackingOptions(tracking_uri=uri)))
    assert (stored.info.status, stored.data.metrics) == ("KILLED", {"heads_kept": 8.0})
    journal.write_text("{\n" + journal.read_text())
    with pytest.raises(TrackingError, match="line 1"):
        replay(journal, TrackingOptions(tracking_uri=uri))


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


@pytest.fixture
def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1], sock


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "swallows"])
def test_a_server_that_does_not_answer_costs_one_warning(journal, checkpoint, free_port, listens, capsys, caplog):
    port, sock = free_port
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
    assert kinds == ["start", "params", *["metrics"] * 4, "dataset", "start", "metrics", "end", "end"]


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


@pytest.fixture
def server(first_run, tmp_path, free_port):
    """An MLflow server on a copy of the store, and its address."""
    (tmp_path / "mlflow.db").write_bytes((first_run[0] / "mlflow.db").read_bytes())
    port, sock = free_port
    sock.close()
    store, artifacts = f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path / "artifacts")
    command = [sys.executable, "-c", SERVER, store, artifacts, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield process, f"http://127.0.0.1:{port}", store
    process.kill()
    process.wait(timeout=10)


def test_a_server_that_dies_costs_one_warning_and_nothing_of_the_run(server, uri, client, journal, checkpoint, capfd):
    process, address, store = server
    warnings = []
    options = TrackingOptions(experiment="served", tracking_uri=address, register="served")
    with tracked_run(options, journal, warn=warnings.append) as run:
        run.log_metrics({"perplexity": 7.25})
        assert run.log_checkpoint(checkpoint, "tiny", {}) == "models:/served/1"
        run.log_artifacts(checkpoint, "files")
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == mlflow_store.QUICK_SECONDS
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
    uploaded = list((journal.parents[1] / "artifacts").rglob("model.safetensors"))
    assert [file.read_bytes() for file in uploaded] == [(checkpoint / "model.safetensors").read_bytes()] * 2

    stored = client.get_run(replay(journal, TrackingOptions(tracking_uri=uri)))
    assert (stored.data.params, stored.info.status) == ({"late": "1"}, "FINISHED")
    assert stored.data.metrics == {"perplexity": 7.25, "speedup": 1.5}


def test_a_replay_to_a_server_that_is_down_raises(journal, uri, free_port):
    with tracked_run(TrackingOptions(tracking_uri=uri), journal):
        pass
    with pytest.raises(ConnectionError, match=r"does not answer .*refused"):
        replay(journal, TrackingOptions(tracking_uri=f"http://127.0.0.1:{free_port[0]}"))


def test_mlflow_takes_the_same_metric_twice_as_one(uri, client, journal):
    """What linking metrics with a model relies on."""
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        for _ in range(2):
            client.log_batch(run.run_id, metrics=[Metric("same", 1.0, 1000, 0)])
    assert steps_of(client, run.run_id, "same") == [(0, 1.0)]
