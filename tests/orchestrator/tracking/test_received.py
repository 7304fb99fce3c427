"""`slimllm log` follows nothing that leads out of an output, whoever wrote its journal and its links."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.tracking import TrackingError, TrackingOptions, how_to_log, log_output, tracked_run
from orchestrator.tracking.journal import Journal
from tests.orchestrator.tracked import events_of, files_of

UNFINISHED = b'{"event": "metrics"}\nhalf a line'


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's, which ends without a newline as an unfinished journal does."""
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_bytes(UNFINISHED)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What a sweep of one model leaves."""
    output = tmp_path / "out"
    options = TrackingOptions(experiment="received", tracking_uri="none", run_name="sweep")
    with tracked_run(options, output / "pruning" / "metrics.jsonl") as run:
        model = output / "model"
        with run.child("model", model / "pruning" / "metrics.jsonl") as child:
            (model / "model.safetensors").write_bytes(b"weights")
            (model / "LICENSE").write_text("free")
            (model / "pruning" / "plan.json").write_text("{}")
            child.log_artifacts(model / "pruning", to="pruning")
            child.log_checkpoint(model, "tiny", {})
        (output / "pruning" / "run.toml").write_text("")
        run.log_artifacts(output / "pruning" / "run.toml", to="pruning")
    return output


def insert(journal: Path, event: dict[str, Any]) -> None:
    """Put an event before the end of a journal."""
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:-1], json.dumps({"time": 1.0, **event}) + "\n", lines[-1]]))


def refused(output: Path, said: str) -> None:
    """Check that nothing is sent, nothing written, and one line said."""
    store = output.parent / "store.db"
    before = files_of(output.parent)
    with pytest.raises(TrackingError, match=said) as raised:
        log_output(output, tracking_uri=f"sqlite:///{store}")
    assert len(str(raised.value).splitlines()) == 1
    assert files_of(output.parent) == before


ARTIFACTS = ("../../home", "../../home/id_rsa", "/etc/passwd", "..", "./..", "plan.json/../..", "", 1)
CHILDREN = (
    *("../../home/id_rsa", "../../pruning/metrics.jsonl", "/etc/pruning/metrics.jsonl", "../../pruning/metrics.jsonl"),
    *(f"../{name}/pruning/metrics.jsonl" for name in ("..", ".", "a/../..")),
)
CHECKPOINTS = ("../../home", "/etc", "../..", ".")
OTHER_FILES: list[dict[str, Any]] = [
    *({"event": "artifacts", "paths": [".", path], "to": "pruning"} for path in ARTIFACTS),
    *({"event": "child", "run_name": "x", "journal": path} for path in CHILDREN),
    *({"event": "checkpoint", "directory": path, "name": "x", "params": {}} for path in CHECKPOINTS),
]


@pytest.mark.parametrize("event", OTHER_FILES, ids=json.dumps)
@pytest.mark.parametrize("journal", ["pruning/metrics.jsonl", "model/pruning/metrics.jsonl"])
def test_a_journal_that_names_other_files_is_refused(
    output: Path, secret: Path, event: dict[str, Any], journal: str
) -> None:
    insert(output / journal, event)
    refused(output, "names .*, which no run writes there")


def test_runs_are_nested_one_deep(output: Path) -> None:
    """A journal that names itself, or its parent's, would be followed without end."""
    insert(
        output / "model/pruning/metrics.jsonl",
        {"event": "child", "run_name": "model", "journal": "../model/pruning/metrics.jsonl"},
    )
    refused(output, "an event 'child' names")


WRONG: list[dict[str, Any]] = [
    {"event": "start", "key": "' OR 1", "uri": "none", "experiment": "x", "run_name": None},
    {"event": "start"},
    {"event": "metrics", "step": "1", "metrics": {}},
    {"event": "metrics", "step": 1, "metrics": []},
    {"event": "params", "params": 1},
    {"event": "note"},
    {"event": "artifacts", "paths": ".", "to": "pruning"},
    {"event": "artifacts", "paths": ["."], "to": "../../x"},
    {"event": ["artifacts"]},
    {"event": "note", "text": "x", "time": "now"},
    {"event": "note", "text": "x", "child": ["a"]},
]


@pytest.mark.parametrize("event", WRONG, ids=json.dumps)
def test_an_event_that_no_run_writes_is_refused(output: Path, event: dict[str, Any]) -> None:
    insert(output / "pruning/metrics.jsonl", event)
    refused(output, "is not as a run writes it")


def to_file(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def to_file_relatively(path: Path, secret: Path) -> None:
    path.symlink_to(os.path.relpath(secret, path.parent))


def to_folder(path: Path, secret: Path) -> None:
    path.symlink_to(secret.parent)


def to_itself(path: Path, secret: Path) -> None:
    path.symlink_to(path.parent)


def to_link(path: Path, secret: Path) -> None:
    path.with_name(".hidden").symlink_to(secret)
    path.symlink_to(".hidden")


def as_pipe(path: Path, secret: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [to_file, to_file_relatively, to_folder, to_itself, to_link, as_pipe])
@pytest.mark.parametrize("name", ["pruning/plan.json", "model/NOTICE", "model/pruning/figures", "model/2.safetensors"])
def test_what_leads_out_of_the_output_is_refused(
    output: Path, secret: Path, name: str, spoil: Callable[[Path, Path], None]
) -> None:
    (output / name).unlink(missing_ok=True)
    spoil(output / name, secret)
    store = output.parent / "store.db"
    with pytest.raises(TrackingError, match=r"is a link to .*put the file itself in its place|neither a file nor a"):
        log_output(output, tracking_uri=f"sqlite:///{store}")
    assert not store.exists()
    assert secret.read_bytes() == UNFINISHED


@pytest.mark.parametrize("journal", ["pruning/metrics.jsonl", "model/pruning/metrics.jsonl", "model/pruning", "model"])
def test_a_journal_that_is_a_link_is_refused(output: Path, tmp_path: Path, journal: str) -> None:
    path = output / journal
    moved = path.rename(tmp_path / "moved")
    path.symlink_to(moved)
    inside = moved if moved.is_file() else next(moved.rglob("metrics.jsonl"))
    inside.write_bytes(inside.read_bytes() + b"half a line")
    refused(output, "is a link to")


def test_nothing_is_cut_where_a_journal_is_read(output: Path) -> None:
    """Of an unfinished line nothing is read; it goes once the next line is written."""
    path = output / "pruning/metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "end", "status"')
    assert how_to_log(output) is not None
    assert [event["event"] for event in Journal(path).events()] == [event["event"] for event in Journal.read(path)]
    assert path.read_bytes() == whole + b'{"event": "end", "status"'
    Journal(path).append({"event": "note", "text": "x"})
    assert path.read_bytes().startswith(whole)
    assert events_of(path)[-1]["text"] == "x"


def test_no_folder_is_made_where_a_journal_is_read(tmp_path: Path) -> None:
    assert Journal(tmp_path / "a" / "metrics.jsonl").events() == []
    assert list(tmp_path.iterdir()) == []


def test_what_lies_in_the_output_is_logged_links_inside_too(
    output: Path, secret: Path, uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    (output / "model/COPYING").symlink_to("LICENSE")
    for hidden in (output / ".venv", output / "model/pruning/.hidden"):
        hidden.symlink_to(secret.parent)
    (tmp_path / "link").symlink_to(output)
    logged = log_output(tmp_path / "link", tracking_uri=uri)
    assert not logged.before
    (model,) = client.search_logged_models([logged.experiment_id])
    files = {Path(file.path).name for file in client.list_logged_model_artifacts(model.model_id)}
    assert files == {"model.safetensors", "LICENSE", "COPYING", "pruning"}
    sent = {file.path for file in client.list_artifacts(str(model.source_run_id), "pruning")}
    assert sent == {"pruning/metrics.jsonl", "pruning/plan.json"}
    assert log_output(output, tracking_uri=uri).before
