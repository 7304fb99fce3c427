"""Working directories of any name: the default database, artifacts, journals and outputs lie in them."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from sqlalchemy import make_url

from orchestrator.cli import main
from orchestrator.record import figures
from orchestrator.tracking import TrackingOptions, database_file, log_output, tracked_run, where_to_look
from tests.orchestrator.conftest import save_nothing

NAMES = [
    *("c%20d", "pct%", "%2e%2e", "%3F%23", "q?x=1", "a b", "h#x", "s;x", "x:memory:y", "ünï-模", "[br]*", "at@y"),
    *("quo'te\"$HOME", "back\\slash", "-dash", "new\nline", "a:"),
]

Enter = Callable[[str], Path]


@pytest.fixture
def enter(tmp_path: Path, first_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Make a working directory of a name, with a store that is migrated already, and go there."""

    def go(name: str) -> Path:
        folder = tmp_path / "above" / name
        folder.mkdir(parents=True)
        shutil.copyfile(first_run[0] / "copy.db", folder / "mlflow.db")
        monkeypatch.chdir(folder)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return folder

    return go


@pytest.mark.parametrize("name", NAMES)
def test_the_default_database_lies_in_the_working_directory(enter: Enter, name: str) -> None:
    folder = enter(name)
    uri = TrackingOptions().resolved_uri
    assert make_url(uri).database == str(folder / "mlflow.db")
    assert not make_url(uri).query
    assert database_file(uri) == folder / "mlflow.db"
    assert shlex.split(where_to_look(uri, "1", "2")) == ["mlflow", "ui", "--backend-store-uri", uri]


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite:////a/b%20c/mlflow.db", "sqlite:////a/b c/mlflow.db?timeout=5", "sqlite+pysqlite:////a/%3F.db"),
        *("sqlite:////a/x:memory:y/mlflow.db", "sqlite:///relative.db", "sqlite:////a/100%/mlflow.db"),
    ],
)
def test_a_uri_that_is_given_names_the_file_that_sqlalchemy_opens(uri: str) -> None:
    assert database_file(uri) == Path(str(make_url(uri).database)).absolute()


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "http://h/a:///b",
        "none",
    ],
)
def test_a_uri_without_a_file_has_none(uri: str) -> None:
    assert database_file(uri) is None


@pytest.mark.parametrize("name", ["c%20d", "q?x=1", "#;'\" %é"])
def test_a_run_is_in_the_working_directory_and_nowhere_else(enter: Enter, name: str) -> None:
    folder, output = enter(name), Path("out")
    (output / "pruning").mkdir(parents=True)
    (output / "model.safetensors").write_bytes(b"weights")
    said: list[str] = []
    with tracked_run(TrackingOptions(experiment=name), output / "pruning" / "metrics.jsonl", said.append) as run:
        run.log_artifacts(output / "pruning", to="pruning")
        run.log_checkpoint(output, "pruned", {})
    assert not said
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert len([path for path in (folder / "mlruns").rglob("model.safetensors") if path.is_file()]) == 1
    stored = MlflowClient(run.tracking_uri).list_artifacts(str(run.run_id), "pruning")
    assert [file.path for file in stored] == ["pruning/metrics.jsonl"]
    assert log_output(output).before


def test_every_command_works_there(
    enter: Enter, gqa_model: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_save", save_nothing)
    folder = enter("c%20d #?;é'\"")
    shutil.copytree(gqa_model, folder / "m%20 #?é")
    shutil.copyfile(token_file, folder / "t%20 #?é.parquet")
    words = ["m%20 #?é", "--calibration", "t%20 #?é.parquet", "--local", "--json"]

    def run(*command: str) -> dict[str, object]:
        result = CliRunner().invoke(main, list(command))
        assert result.exit_code == 0, result.output
        assert "warning" not in result.stderr
        return dict(json.loads(result.stdout))

    pruned = run("prune", *words, "--sparsity", ".3", "--evaluate", "t%20 #?é.parquet", "--register", "m%20 #?é")
    assert (folder / "pruned" / "m%20 #?é-0.3" / "config.json").is_file()
    assert run("log", str(pruned["output"]), "--json")["before"]
    compared = run("compare", *words, "--sparsity", ".3", "--method", "magnitude", "--evaluate", "t%20 #?é.parquet")
    assert compared["run_id"]
    assert (folder / "comparisons" / "m%20 #?é" / "comparison.json").is_file()
    moments = run("calibrate", *words)["moments"]
    run("prune", *words, "--method", "gram", "--moments", str(moments), "--output", "from %moments")
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
