"""`slimllm log` logs from the output what MLflow missed because its server was down, died or hung."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run as StoredRun

from orchestrator import progress
from orchestrator.cli import main
from orchestrator.progress import Reporter
from orchestrator.tracking import TrackingError, TrackingOptions, how_to_log, log_output, tracked_run
from tests.forks import Forks
from tests.orchestrator.tracked import (
    TrackingServer,
    assert_everything_logged,
    events_of,
    files_of,
    log_everything,
    serving,
    steps_of,
)

NOBODY = "http://127.0.0.1:9"


def write_output(output: Path, tracking_uri: str, experiment: str, register: str | None = None) -> None:
    """Write what a run of two models leaves, which is logged as far as there is a server."""
    options = TrackingOptions(experiment=experiment, tracking_uri=tracking_uri, run_name="sweep", register=register)
    with tracked_run(options, output / "pruning" / "metrics.jsonl", warn=lambda line: None) as run:
        run.log_params({"seed": 7})
        model = output / "sparsity-0.20"
        with run.child("sparsity-0.20", model / "pruning" / "metrics.jsonl") as child:
            (model / "model.safetensors").write_bytes(b"weights")
            (model / "pruning" / "plan.json").write_text("{}")
            log_everything(child, files=model / "pruning")
            child.log_note("a child")
            child.log_checkpoint(model, "Tiny-1.1", {"sparsity": 0.2}, alias="sparsity-0.20", description="a version")


def runs_of(client: MlflowClient, experiment: str) -> dict[str, StoredRun]:
    """Return an experiment's runs by name."""
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    runs = {run.info.run_name: client.get_run(run.info.run_id) for run in found}
    assert len(runs) == len(found)
    return runs


def slimllm_log(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["log", *map(str, arguments)])


def test_an_output_whose_server_was_never_there_is_logged_once(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_output(output, NOBODY, "never there", register="never-there")
    assert how_to_log(output) == f"slimllm log {output} --tracking-uri {NOBODY}"
    moved = output.rename(tmp_path / "moved")
    first = slimllm_log(moved, "--tracking-uri", uri)
    assert first.exit_code == 0, first.output
    runs = runs_of(client, "never there")
    assert runs.keys() == {"sweep", "sparsity-0.20"}
    sweep, child = runs["sweep"], runs["sparsity-0.20"]
    assert child.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert (sweep.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert_everything_logged(client, child.info.run_id)
    events = events_of(moved / "sparsity-0.20" / "pruning" / "metrics.jsonl")
    times = [int(event["time"] * 1000) for event in events if event["event"] in ("start", "end")]
    assert [child.info.start_time, child.info.end_time] == times
    assert {file.path for file in client.list_artifacts(child.info.run_id, "pruning")} >= {"pruning/plan.json"}
    (version,) = client.search_model_versions("name = 'never-there'")
    assert version.run_id == child.info.run_id
    assert (version.tags, version.description) == ({"sparsity": "0.2"}, "a version")
    assert client.get_registered_model("never-there").aliases == {"sparsity-0-20": version.version}
    assert child.data.tags["mlflow.note.content"] == "a child"
    assert f"is logged as MLflow run {sweep.info.run_id}" in first.output
    assert how_to_log(moved) is None

    before = files_of(moved)
    again = slimllm_log(moved, "--tracking-uri", uri)
    assert again.exit_code == 0, again.output
    assert f"is logged already as MLflow run {sweep.info.run_id}" in again.output
    assert files_of(moved) == before
    assert [run.to_dictionary() for run in runs_of(client, "never there").values()] == [
        run.to_dictionary() for run in runs.values()
    ]
    assert len(client.search_model_versions("name = 'never-there'")) == 1


def test_what_was_logged_while_it_ran_is_logged_already(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    write_output(tmp_path, uri, "while it ran")
    assert how_to_log(tmp_path) is None
    assert log_output(tmp_path, tracking_uri=uri).before
    # Registering it is something new, and the rest stays as it is.
    assert not log_output(tmp_path, tracking_uri=uri, register="while-it-ran").before
    assert log_output(tmp_path, tracking_uri=uri, register="while-it-ran").before
    (model,) = client.search_logged_models([client.get_experiment_by_name("while it ran").experiment_id])
    (version,) = client.search_model_versions("name = 'while-it-ran'")
    assert model.model_id in version.source
    assert_everything_logged(client, runs_of(client, "while it ran")["sparsity-0.20"].info.run_id)


def test_an_alias_that_is_missing_is_set_and_one_that_was_moved_stays(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    write_output(tmp_path / "first", uri, "aliases", register="aliased")
    write_output(tmp_path / "second", uri, "aliases", register="aliased")

    def holder() -> str:
        # A database has numbers where a server has text.
        return str(client.get_registered_model("aliased").aliases.get("sparsity-0-20"))

    assert holder() == "2", "the latest has it"
    client.set_registered_model_alias("aliased", "sparsity-0-20", "1")
    assert log_output(tmp_path / "second", tracking_uri=uri).before
    assert holder() == "1", "whoever moved it knows better"
    client.delete_registered_model_alias("aliased", "sparsity-0-20")
    assert not log_output(tmp_path / "first", tracking_uri=uri).before
    assert log_output(tmp_path / "first", tracking_uri=uri).before
    assert holder() == "1"


@pytest.mark.parametrize("lost", ["run", "model"])
def test_what_was_deleted_from_the_store_is_logged_again(
    uri: str, client: MlflowClient, tmp_path: Path, lost: str
) -> None:
    experiment = f"deleted {lost}"
    write_output(tmp_path, uri, experiment)
    child = runs_of(client, experiment)["sparsity-0.20"]
    if lost == "run":
        client.delete_run(child.info.run_id)
    else:
        client.delete_logged_model(child.outputs.model_outputs[0].model_id)
    assert not log_output(tmp_path, tracking_uri=uri).before
    assert log_output(tmp_path, tracking_uri=uri).before
    runs = runs_of(client, experiment)
    assert len(runs) == 2
    assert_everything_logged(client, runs["sparsity-0.20"].info.run_id)
    models = client.search_logged_models([child.info.experiment_id])
    assert models[0].source_run_id == runs["sparsity-0.20"].info.run_id


def test_another_experiment_and_name_give_another_run(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    write_output(tmp_path, uri, "one")
    logged = log_output(tmp_path, tracking_uri=uri, experiment="two", run_name="renamed")
    assert not logged.before
    assert runs_of(client, "two").keys() == {"renamed", "sparsity-0.20"}
    assert log_output(tmp_path, tracking_uri=uri, experiment="two").run_id == logged.run_id


def test_children_in_one_journal_and_files_are_logged_too(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """As a comparison leaves them."""
    options = TrackingOptions(experiment="comparison", tracking_uri=NOBODY, run_name="all")
    with tracked_run(options, tmp_path / "metrics.jsonl", warn=lambda line: None) as run:
        for name in ("a", "b"):
            with run.child(name) as child:
                child.log_metrics({"perplexity": 7})
        (tmp_path / "comparison.md").write_text("table")
        run.log_artifacts(tmp_path / "comparison.md")
    assert not log_output(tmp_path, tracking_uri=uri).before
    assert log_output(tmp_path, tracking_uri=uri).before
    runs = runs_of(client, "comparison")
    assert runs.keys() == {"all", "a", "b"}
    assert runs["b"].data.metrics == {"perplexity": 7}
    assert [file.path for file in client.list_artifacts(runs["all"].info.run_id)] == ["comparison.md"]


# ---- What is no finished output, and servers that fail


def test_what_cannot_be_logged_ends_in_one_line_and_code_2(uri: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_output(output, NOBODY, "errors")
    journal = output / "sparsity-0.20" / "pruning" / "metrics.jsonl"
    lines = journal.read_text().splitlines(keepends=True)

    def fails(directory: Path, *said: str, address: str = uri) -> None:
        begun = time.monotonic()
        result = slimllm_log(directory, "--tracking-uri", address)
        assert time.monotonic() - begun < 20
        assert result.exit_code == 2
        assert len(result.output.splitlines()) == 1
        assert all(words in result.output for words in ("slimllm: ", *said)), result.output

    fails(tmp_path / "missing", "missing does not exist")
    fails(tmp_path, "has no pruning/metrics.jsonl")
    fails(output, "127.0.0.1:9 does not answer", "another --tracking-uri", address="http://user:secret@127.0.0.1:9")
    journal.write_text("".join(lines[:-1]))
    fails(output, "has not finished")
    journal.write_text("".join(lines[:-1]) + lines[-1].replace("FINISHED", "FAILED"))
    fails(output, "has not finished")
    journal.write_text("".join(lines))
    (output / "sparsity-0.20" / "model.safetensors").unlink()
    fails(output, "has no weights")
    journal.unlink()
    fails(output, "metrics.jsonl cannot be", "No such file")


def test_what_is_refused_is_no_success(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    client.delete_experiment(client.create_experiment("refused"))
    write_output(tmp_path, NOBODY, "refused")
    result = slimllm_log(tmp_path, "--tracking-uri", uri)
    assert result.exit_code == 2
    assert "was deleted: run `mlflow experiments restore" in result.output
    assert how_to_log(tmp_path) is not None


def test_a_server_that_hangs_holds_up_no_run(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    warnings: list[str] = []
    output = tmp_path / "out"
    options = TrackingOptions(experiment="hung", tracking_uri=server.address)
    with tracked_run(options, output / "pruning" / "metrics.jsonl", warn=warnings.append) as run:
        run_id = run.run_id
        (output / "model.safetensors").write_bytes(b"weights")
        run.log_checkpoint(output, "tiny", {})
        server.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        log_everything(run, files=output / "pruning")
    # One call is tried twice, and no other at all; all of them would take a minute.
    assert time.monotonic() - begun < 10
    assert len(warnings) == 1
    with pytest.raises(TrackingError, match="does not answer"):
        log_output(output, tracking_uri=server.address)
    server.process.send_signal(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    logged = log_output(output, tracking_uri=server.address)
    assert (logged.run_id, logged.before) == (run_id, False)
    assert_everything_logged(MlflowClient(server.store), logged.run_id)


def test_a_real_run_whose_server_dies_goes_on_and_is_completed(
    gqa_model: Path,
    token_file: Path,
    server: TrackingServer,
    forks: Forks,
    other_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killing(Reporter):
        """Kills the server when the second layer is decided."""

        def layers(self, stage: str, num_layers: int, tokens: int, first: int = 0) -> Iterator[int]:
            for layer in super().layers(stage, num_layers, tokens, first):
                if (stage, layer) == ("deciding", 1):
                    os.kill(server.process.pid, signal.SIGKILL)
                    server.process.wait(timeout=10)
                yield layer

    monkeypatch.setattr(progress, "Reporter", Killing)
    output = tmp_path / "out"
    asked = ["--method", "gram", "--sparsity", ".2", "--sparsity", ".4", "--local", "--calibration", token_file]
    places = ["--output", output, "--tracking-uri", server.address, "--register", "tiny", "--run-name", "sweep"]
    places += ["--experiment", "died"]
    result = CliRunner().invoke(main, ["prune", *map(str, (gqa_model, *asked, *places))])
    assert result.exit_code == 0, result.output
    assert len([line for line in result.stderr.splitlines() if "does not answer" in line]) == 1
    assert result.stdout.splitlines()[-1] == f"slimllm log {output} --tracking-uri {server.address}"
    client = MlflowClient(server.store)
    before = runs_of(client, "died")
    names = {"sweep", "sparsity-0.20", "sparsity-0.40"}
    assert {name: run.info.status for name, run in before.items()} == dict.fromkeys(names, "RUNNING")

    with serving(forks, other_store, int(server.address.rpartition(":")[2])) as again:
        said = [slimllm_log(output, "--tracking-uri", again.address) for _ in range(2)]
        served = MlflowClient(again.address)
        models = served.search_logged_models([served.get_experiment_by_name("died").experiment_id])
        logged = {file.path for file in served.list_artifacts(before["sweep"].info.run_id, "pruning")}
        for model in models:
            files = {file.path for file in served.list_logged_model_artifacts(model.model_id)}
            assert {"config.json", "pruning", "README.md"} <= files
    assert [one.exit_code for one in said] == [0, 0], [one.output for one in said]
    sweep = before["sweep"].info.run_id
    assert f"is logged as MLflow run {sweep}" in said[0].output
    assert f"is logged already as MLflow run {sweep}" in said[1].output
    after = runs_of(client, "died")
    assert {name: run.info.run_id for name, run in after.items()} == {
        name: run.info.run_id for name, run in before.items()
    }
    for name in names - {"sweep"}:
        run = after[name]
        assert run.info.status == "FINISHED"
        assert [step for step, _ in steps_of(client, run.info.run_id, "channels_kept")] == [0, 1, 2]
        assert len(run.outputs.model_outputs) == 1
    assert len(models) == 2
    versions = {version.run_id: version.version for version in client.search_model_versions("name = 'tiny'")}
    assert len(versions) == 2
    aliases = {name.replace(".", "-"): versions[after[name].info.run_id] for name in names - {"sweep"}}
    assert client.get_registered_model("tiny").aliases == aliases
    # The table of the models was made when there was no server.
    assert "sparsity-0.40" in after["sweep"].data.tags["mlflow.note.content"]
    assert "pruning/sweep.csv" in logged
