"""Secrets in a URI or in the environment of a command appear in nothing that it writes."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.cli.summary import print_summary
from orchestrator.pipeline import PruneResult
from orchestrator.tracking import TrackingError, TrackingOptions, tracked_run
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
