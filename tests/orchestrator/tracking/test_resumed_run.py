"""A run whose process was killed continues in MLflow from its journal, and logs nothing twice."""

from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.tracking import TrackingError, TrackingOptions, tracked_run
from orchestrator.tracking.journal import Journal
from tests.forks import Forks
from tests.orchestrator.tracked import events_of, steps_of

# Killed between two lines: the last layer is in the journal and half of another event, MLflow has neither.
KILLED = """
import os, signal
from pathlib import Path
from orchestrator.tracking import TrackingOptions, tracked_run
uri, folder = {uri!r}, Path({folder!r})
journals = folder / "pruning" / "metrics.jsonl", folder / "child" / "pruning" / "metrics.jsonl"
with tracked_run(TrackingOptions(experiment="killed", tracking_uri=uri), journals[0]) as run:
    run.log_params(dict(seed=7))
    run.log_dataset("wikitext", "ab" * 32, "calibration", "train.txt", n_blocks=4, block_length=16, n_tokens=64)
    with run.child("child", journals[1]) as child:
        for layer in range(2):
            child.log_metrics(dict(heads_kept=8 - layer), step=layer)
        child._journal.append(dict(event="metrics", step=2, metrics=dict(heads_kept=6.0)))
        with journals[1].open("a") as file:
            file.write('{{"event": "metrics", "step": 3, "met')
        os.kill(os.getpid(), signal.SIGKILL)
"""


def interrupted(options: TrackingOptions, journal: Path, *layers: int) -> str:
    """Log layers of a run that is then interrupted; return its id in MLflow, or "" where that is not to be had."""
    run_id = ""
    with suppress(KeyboardInterrupt), tracked_run(options, journal, warn=lambda line: None) as run:
        for layer in layers:
            run.log_metrics({"heads_kept": 8 - layer}, step=layer)
        run_id = run.run_id or ""
        raise KeyboardInterrupt
    return run_id


def runs_of(client: MlflowClient, experiment: str) -> list[str]:
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return [run.info.run_id for run in found]


def test_a_killed_run_goes_on(uri: str, client: MlflowClient, tmp_path: Path, forks: Forks) -> None:
    assert forks.run(KILLED.format(uri=uri, folder=str(tmp_path))).code == -9
    before = runs_of(client, "killed")
    assert [client.get_run(run_id).info.status for run_id in before] == ["RUNNING"] * 2

    own = tmp_path / "child" / "pruning" / "metrics.jsonl"
    options = TrackingOptions(experiment="killed", tracking_uri=uri)
    with tracked_run(options, tmp_path / "pruning" / "metrics.jsonl") as run, run.child("child", own) as child:
        assert (run.logged_steps, child.logged_steps) == (set(), {0, 1, 2})
        run.log_params({"seed": 7})
        run.log_dataset("wikitext", "ab" * 32, "calibration", "train.txt", n_blocks=4, block_length=16, n_tokens=64)
        child.log_metrics({"heads_kept": 5}, step=3)
        assert client.get_run(run.run_id).info.status == "RUNNING"

    assert sorted(runs_of(client, "killed")) == sorted(before) == sorted([run.run_id, child.run_id])
    stored = client.get_run(run.run_id)
    assert (stored.info.status, stored.data.params) == ("FINISHED", {"seed": "7"})
    assert len(stored.inputs.dataset_inputs) == len(stored.inputs.dataset_inputs[0].tags) == 1
    assert client.get_run(child.run_id).info.status == "FINISHED"
    assert steps_of(client, child.run_id, "heads_kept") == [(0, 8.0), (1, 7.0), (2, 6.0), (3, 5.0)]
    kinds = ["start", "stored", *["metrics"] * 3, "start", "metrics", "end", "logged"]
    assert [event["event"] for event in events_of(own)] == kinds


def test_the_journal_says_where_the_run_is_stored(uri: str, client: MlflowClient, journal: Path) -> None:
    run_id = interrupted(TrackingOptions(tracking_uri=f"{uri}?password=secret"), journal)
    (stored,) = [event for event in events_of(journal) if event["event"] == "stored"]
    experiment = client.get_experiment_by_name("slimllm").experiment_id
    expected = {"uri": f"{uri}?password=***", "experiment_id": experiment, "run_id": run_id}
    assert {name: stored[name] for name in expected} == expected
    assert "secret" not in journal.read_text()


def test_a_run_that_was_deleted_is_a_new_one_with_all_of_the_journal(
    uri: str, client: MlflowClient, journal: Path
) -> None:
    options = TrackingOptions(experiment="deleted", tracking_uri=uri)
    first = interrupted(options, journal, 0, 1)
    client.delete_run(first)
    second = interrupted(options, journal, 2)
    assert second != first
    assert steps_of(client, second, "heads_kept") == [(0, 8.0), (1, 7.0), (2, 6.0)]
    assert client.get_run(second).info.start_time == client.get_run(first).info.start_time


def test_a_run_whose_server_was_down_or_another_is_a_new_one_with_all_of_the_journal(
    uri: str, client: MlflowClient, journal: Path, other_store: Path
) -> None:
    down = TrackingOptions(experiment="moved", tracking_uri="http://127.0.0.1:9")
    assert interrupted(down, journal, 0) == ""
    first = interrupted(TrackingOptions(experiment="moved", tracking_uri=uri), journal, 1)
    assert steps_of(client, first, "heads_kept") == [(0, 8.0), (1, 7.0)]
    store = f"sqlite:///{other_store / 'mlflow.db'}"
    second = interrupted(TrackingOptions(experiment="moved", tracking_uri=store), journal, 2)
    assert steps_of(MlflowClient(store), second, "heads_kept") == [(0, 8.0), (1, 7.0), (2, 6.0)]
    assert interrupted(TrackingOptions(experiment="moved", tracking_uri=uri), journal) == first
    assert steps_of(client, first, "heads_kept") == [(0, 8.0), (1, 7.0), (2, 6.0)]


def test_a_run_is_found_again_though_its_id_was_never_written(uri: str, client: MlflowClient, journal: Path) -> None:
    options = TrackingOptions(experiment="unwritten", tracking_uri=uri)
    first = interrupted(options, journal, 0)
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    assert interrupted(options, journal, 0) == first
    assert runs_of(client, "unwritten") == [first]


def test_a_checkpoint_is_uploaded_and_registered_once(
    uri: str, client: MlflowClient, journal: Path, checkpoint: Path
) -> None:
    options = TrackingOptions(experiment="models", tracking_uri=uri, register="once")
    addresses = []
    for _ in range(2):
        with suppress(KeyboardInterrupt), tracked_run(options, journal) as run:
            run.log_metrics({"perplexity": 7.0})
            addresses.append(run.log_checkpoint(checkpoint, "tiny", {"sparsity": 0.2}))
            raise KeyboardInterrupt
    assert addresses == ["models:/once/1"] * 2
    (output,) = client.get_run(run.run_id).outputs.model_outputs
    found = client.search_logged_models([run.experiment_id])
    assert [(model.model_id, model.status) for model in found] == [(output.model_id, "READY")]


def test_a_resumed_run_takes_no_alias_from_what_was_registered_after_it(
    uri: str, client: MlflowClient, journal: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = TrackingOptions(experiment="aliases", tracking_uri=uri, register="resumed")
    holders = []
    for path in (journal, tmp_path / "later.jsonl", journal):
        with suppress(KeyboardInterrupt), tracked_run(options, path) as run:
            run.log_checkpoint(checkpoint, "tiny", {}, alias="ratio-0.25")
            holders.append({name: str(held) for name, held in client.get_registered_model("resumed").aliases.items()})
            raise KeyboardInterrupt
    assert holders == [{"ratio-0-25": "1"}, {"ratio-0-25": "2"}, {"ratio-0-25": "2"}]


def test_an_alias_that_was_not_set_any_more_is_set_by_the_run_that_goes_on(
    uri: str, client: MlflowClient, journal: Path, checkpoint: Path
) -> None:
    options = TrackingOptions(experiment="aliases", tracking_uri=uri, register="killed between")
    for _ in range(2):
        with suppress(KeyboardInterrupt), tracked_run(options, journal) as run:
            assert run.log_checkpoint(checkpoint, "tiny", {}, alias="sparsity-0.20") == "models:/killed between/1"
            assert client.get_registered_model("killed between").aliases.keys() == {"sparsity-0-20"}
            client.delete_registered_model_alias("killed between", "sparsity-0-20")
            raise KeyboardInterrupt


def test_an_upload_that_was_cut_short_is_completed(
    uri: str, client: MlflowClient, journal: Path, checkpoint: Path
) -> None:
    options = TrackingOptions(experiment="half a model", tracking_uri=uri)
    run_id = interrupted(options, journal)
    experiment = client.get_experiment_by_name("half a model").experiment_id
    half = client.create_logged_model(experiment, name="tiny", source_run_id=run_id)
    with tracked_run(options, journal) as run:
        assert run.log_checkpoint(checkpoint, "tiny", {}) == f"models:/{half.model_id}"
    assert client.get_logged_model(half.model_id).status == "READY"
    files = {file.path for file in client.list_logged_model_artifacts(half.model_id)}
    assert files == {"model.safetensors", "nested"}


def test_what_a_resumed_run_is_asked_differently_is_said_and_the_rest_is_logged(
    uri: str, client: MlflowClient, journal: Path
) -> None:
    options = TrackingOptions(tracking_uri=uri)
    with suppress(KeyboardInterrupt), tracked_run(options, journal) as run:
        run.log_params({"workers": 1, "seed": 7})
        raise KeyboardInterrupt
    warnings: list[str] = []
    with tracked_run(options, journal, warn=warnings.append) as run:
        run.log_params({"workers": 2, "seed": 7, "offload": True})
    assert client.get_run(run.run_id).data.params == {"workers": "1", "seed": "7", "offload": "True"}
    (line,) = warnings
    assert "workers stays 1, now 2" in line


def test_a_child_moves_to_the_run_that_took_its_parents_place(
    uri: str, client: MlflowClient, journal: Path, tmp_path: Path
) -> None:
    options, own = TrackingOptions(tracking_uri=uri), tmp_path / "own" / "metrics.jsonl"
    ids = []
    for _ in range(2):
        with suppress(KeyboardInterrupt), tracked_run(options, journal) as run, run.child("inner", own) as child:
            ids.append((run.run_id, child.run_id))
            raise KeyboardInterrupt
        client.delete_run(ids[0][0])
    assert ids[0][0] != ids[1][0]
    assert ids[0][1] == ids[1][1]
    assert client.get_run(ids[1][1]).data.tags["mlflow.parentRunId"] == ids[1][0]


@pytest.mark.parametrize("cut", [1, 10, None])
def test_a_line_that_was_cut_short_does_not_spoil_the_next(tmp_path: Path, cut: int | None) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.append({"event": "metrics", "step": 0})
    journal.append({"event": "metrics", "step": 1})
    # From one byte of the line that is left to all of it but the end of the line.
    first, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + last[: cut or len(last) - 1])
    Journal(path).append({"event": "metrics", "step": 2})
    assert [event["step"] for event in Journal.read(path)] == [0, 2]


@pytest.mark.parametrize("line", ["{", "1", '{"step": 1}', "\xff"])
def test_a_file_that_is_no_journal_is_an_error(uri: str, tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line.encode("latin1") + b"\n")
    with pytest.raises(TrackingError, match="line 1"):  # noqa: SIM117
        with tracked_run(TrackingOptions(tracking_uri=uri), path):
            pytest.fail("the run began")
    assert path.read_bytes() == line.encode("latin1") + b"\n"
