"""Secrets in a URI or in the environment of a command appear in nothing that it writes."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from orchestrator.cli import main
from orchestrator.cli.summary import print_summary
from orchestrator.inputs import model_name
from orchestrator.pipeline import PruneResult
from orchestrator.tracking import TrackingError, TrackingOptions, log_output, tracked_run
from tests.conftest import content
from tests.forks import Ended, Forks, slimllm
from tests.orchestrator.tracked import TrackingServer

SECRETS = {"HF_TOKEN": "hf_Wq71", "MLFLOW_TRACKING_PASSWORD": "p-Xk93"}
IN_URI = "u-Zt58"


def run_slimllm(forks: Forks, *arguments: object) -> Ended:
    return forks.run(slimllm(*arguments), seconds=300, **SECRETS, MLFLOW_TRACKING_USERNAME="user")


def assert_no_secret(text: bytes, where: object) -> None:
    for secret in (*SECRETS.values(), IN_URI):
        assert secret.encode() not in text, f"{secret} is in {where}"


def test_a_command_leaves_no_secret(
    gqa_model: Path, token_file: Path, server: TrackingServer, other_store: Path, tmp_path: Path, forks: Forks
) -> None:
    served = server.address.replace("//", f"//user:{IN_URI}@")
    database = f"{server.store}?password={IN_URI}"
    output = tmp_path / "out"
    places = ["--output", output, "--tracking-uri", served, "--register", "tiny"]
    asked = ["--calibration", token_file, "--local", "--run-name", f"at {served}"]
    pruned = run_slimllm(forks, "prune", gqa_model, *asked, *places)
    assert pruned.code == 0, pruned.stderr
    logged = run_slimllm(forks, "log", output, "--tracking-uri", database, "--experiment", "database")
    assert logged.code == 0, logged.stderr
    down = run_slimllm(forks, "log", output, "--tracking-uri", f"http://user:{IN_URI}@127.0.0.1:9")
    assert down.code == 2
    nowhere = ["--address", f"ray://user:{IN_URI}@127.0.0.1:9", "--tracking-uri", database]
    away = run_slimllm(forks, "prune", gqa_model, *nowhere)
    assert away.code == 2
    for name, ended in {"prune": pruned, "log": logged, "log, down": down, "prune, away": away}.items():
        assert_no_secret((ended.stdout + ended.stderr).encode(), name)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "metrics.jsonl", "plan.json", "README.md", "config.json"} <= {path.name for path in files}
    for path in files:
        assert_no_secret(path.read_bytes(), path)
    # The runs are there, so what was searched is what they left.
    assert len(MlflowClient(server.store).search_runs(["0", "1", "2", "3"])) == 3


@pytest.mark.parametrize(
    "bad", ["gopher://user:u-Zt58@host", "http://user:u-Z/t58@host", "nonsense://h?token=u-Zt58", "sqlite:///?k=u-Zt58"]
)
def test_an_error_names_no_secret_nor_does_what_it_came_from(journal: Path, bad: str) -> None:
    with pytest.raises(TrackingError) as caught:  # noqa: SIM117
        with tracked_run(TrackingOptions(tracking_uri=bad), journal):
            pytest.fail("the run began")
    text = "".join(traceback.format_exception(caught.value))
    # What is quoted of this file, with the address in it, is no message.
    said = [line for line in text.splitlines() if not line.startswith(" ")]
    assert "t58" not in "".join(said)
    assert "u-Z" not in "".join(said)


def test_tags_of_the_command_and_the_repository_have_no_secret(
    uri: str, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a program in a notebook or a job is named by the address that it came from.
    monkeypatch.setattr(sys, "argv", [f"http://user:{IN_URI}@host/program.py"])
    with tracked_run(TrackingOptions(tracking_uri=uri), journal) as run:
        assert run.run_id is not None
    tags = MlflowClient(uri).get_run(run.run_id).data.tags
    assert tags["mlflow.source.name"] == "http://***@host/program.py"


def test_a_lost_server_is_named_without_its_password(
    prune_model: Callable[..., PruneResult], gqa_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = prune_model(gqa_model, tracking_uri=f"http://user:{IN_URI}@127.0.0.1:9")
    print_summary(result)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"slimllm log {result.output} --tracking-uri 'http://***@127.0.0.1:9'"


# Secrets that are words of what a run records: its method, its events, its settings and files.
WORDS = {
    **{"X_TOKEN": "gram", "DB_PASS": "metrics", "MYSQL_PWD": "pruning", "OPENAI_KEY": "checkpoint"},
    **{"A_SECRET": "slimllm", "B_PASSWORD": "params", "C_TOKEN": "tokens.parquet", "D_KEY": "artifacts"},
    **{"E_TOKEN": "FINISHED", "F_TOKEN": "float32", "G_TOKEN": "0000"},
}


def test_secrets_in_the_environment_change_no_byte_of_an_output(
    prune_model: Callable[..., PruneResult], gqa_model: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"method": "gram", "sparsity": (0.2, 0.4)}
    plain = prune_model(gqa_model, **asked)
    for name, value in WORDS.items():
        monkeypatch.setenv(name, value)
    secret = prune_model(gqa_model, **asked)
    assert content(secret.output) == content(plain.output)
    # The journal has all that MLflow is told later, under its name.
    logged = log_output(secret.output, tracking_uri=uri)
    client = MlflowClient(uri)
    children = client.search_runs([logged.experiment_id], f"tags.mlflow.parentRunId = '{logged.run_id}'")
    assert [(run.info.status, run.data.params["method"]) for run in children] == [("FINISHED", "gram")] * 2
    assert client.get_experiment(logged.experiment_id).name == "slimllm"


def test_a_secret_in_the_name_of_a_place_is_not_told_to_the_server(
    prune_model: Callable[..., PruneResult], gqa_model: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X_TOKEN", gqa_model.name)
    result = prune_model(gqa_model, tracking_uri=uri)
    assert result.run_id is not None
    assert MlflowClient(uri).get_run(result.run_id).data.params["model"] == f"{gqa_model.parent}/***"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["prune", "nonsense://user:u-Zt58@host/model"], 2),
        (["prune", "--moments", "nonsense://user:u-Zt58@host/m", "--method", "gram"], 2),
        (["prune", "--calibration", "nonsense://host/text.txt?sig=u-Zt58"], 2),
        (["prune", "a", "http://user:u-Zt58@host"], 2),
        (["prune", "--sparsity", "http://user:u-Zt58@host"], 2),
        (["http://user:u-Zt58@host"], 2),
        (["log", "nonsense://user:u-Zt58@host/output"], 2),
        (
            ["doctor", "nonsense://user:u-Zt58@host/model", "--tracking-uri", "nonsense://user:u-Zt58@host", "--local"],
            2,
        ),
    ],
)
@pytest.mark.parametrize("told", [["--verbose"], ["--json"]])
def test_no_error_and_no_traceback_shows_a_secret(
    words: list[str], code: int, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(main, [*words, *told])
    assert result.exit_code == code, result.output
    assert IN_URI not in result.output
    assert not [path for path in tmp_path.rglob("*") if IN_URI in path.name]


def test_the_traceback_of_a_bug_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_KEY", "sk-Xk93")

    def fail(*arguments: object) -> None:
        raise AssertionError("http://user:u-Zt58@host refused sk-Xk93")

    monkeypatch.setattr("orchestrator.pipeline.load_inputs", fail)
    for told in ([], ["--verbose"]):
        result = CliRunner().invoke(main, ["prune", "--tracking-uri", "none", "--local", *told])
        assert result.exit_code == 1
        assert "AssertionError: http://***@host refused ***" in result.stderr
        assert "sk-Xk93" not in result.output


def test_the_name_of_a_model_in_a_store_has_no_password_and_no_query() -> None:
    assert model_name("s3://user:u-Zt58@bucket/tiny?sig=a/b") == "tiny"
    assert model_name("s3://user:u-Zt58@bucket") == "bucket"
