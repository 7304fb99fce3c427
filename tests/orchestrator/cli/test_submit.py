"""The real commands run jobs on somebody else's Ray cluster, with a token."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from cluster import job_client
from orchestrator.cli import main
from orchestrator.config import ConfigError
from orchestrator.tracking import TrackingOptions, log_output, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting_output
from tests.forks import Ended, Started
from tests.orchestrator.cli.test_working_directory import fill
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.job_server import (
    SECONDS,
    Head,
    Proxy,
    Terminal,
    started_head,
    thaw_when_told_to_end,
    wait_for,
)

LAST_SIMILARITY = "layer similarities: layer 12/12"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="module")
def deep_model(make_llama: Callable[..., Path]) -> Path:
    """A model of some layers, so that a job can be stopped between them."""
    return make_llama(num_hidden_layers=12, hidden_size=16, intermediate_size=32)


def mlflow_run(uri: str, run_id: str) -> Any:
    return MlflowClient(uri).get_run(run_id)


def layers_logged(uri: str, job_id: str) -> int:
    """How many layers' decisions MLflow has of the run of a job."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("slimllm")
    runs = (
        client.search_runs([experiment.experiment_id], f"tags.`slimllm.ray_job_id` = '{job_id}'") if experiment else []
    )
    return len(client.get_metric_history(runs[0].info.run_id, "heads_kept")) if runs else 0


def job_of(said: str) -> str:
    return next(word.rstrip(":") for word in said.split() if word.startswith("raysubmit_"))


# Where a head's agent says that it is there, which Ray's job server reads once.
AGENT = """
import sys
from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD as SPACE
from ray._raylet import GcsClient
from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX as PREFIX
store = GcsClient(address="127.0.0.1:{port}")
if "{taken}":
    key, value = map(bytes.fromhex, "{taken}".split())
    store.internal_kv_put(key, value, overwrite=True, namespace=SPACE)
else:
    while not (keys := store.internal_kv_keys(PREFIX.encode(), namespace=SPACE)):
        pass
    print(keys[0].hex(), store.internal_kv_get(keys[0], namespace=SPACE).hex())
    store.internal_kv_del(keys[0], del_by_prefix=False, namespace=SPACE)
"""


@pytest.mark.slow
def test_a_head_whose_agent_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    with started_head(tmp_path) as head:

        def agent(taken: str) -> str:
            ended = head.client.run(AGENT.format(port=head.head_port, taken=taken), seconds=SECONDS)
            assert ended.code == 0, ended.stderr
            return ended.stdout.strip()

        taken = agent("")
        submitter = head.start("submit", "--no-follow", "--", "log", "/nowhere")
        said = submitter.stderr.readline()
        assert said == "waiting up to 60 s for the cluster's job server, which is starting\n"
        agent(taken)
        job_id, stderr = submitter.communicate(timeout=SECONDS)
        assert submitter.returncode == 0, stderr
        assert head.state(job_id.strip())["words"] == "log /nowhere"


# ---- Without a cluster


@pytest.fixture
def nobody_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a job server that does not answer (test_job_client.py shows that it is waited for)."""
    monkeypatch.setattr(job_client, "REFUSING_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "--address", "head:6379"], "the job is already on its cluster: pass --address before 'prune' only"),
        (
            ["--", "jobs", "list"],
            "'jobs' is not a command that a job can run: pass one of prune, tune, evaluate, bench, report, "
            "calibrate, compare, log",
        ),
        (["--env", "NOT_SET_ANYWHERE", "prune"], "--env NOT_SET_ANYWHERE: the variable is not set here"),
        (["--env", "=1", "prune"], "--env '=1' names no variable"),
        (["--address", "http://127.0.0.1:1", "prune"], "no Ray job server answers at http://127.0.0.1:1: check"),
        (["--address", "127.0.0.1:1", "prune"], "no Ray job server answers at http://127.0.0.1:1: check"),
    ],
)
@pytest.mark.usefixtures("nobody_starts")
def test_what_no_job_can_do_is_refused_in_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = CliRunner().invoke(main, ["submit", *words])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"slimllm: {said}")
    assert len(result.stderr.splitlines()) == 1


def test_an_option_that_the_command_has_not_is_refused_before_it_is_sent() -> None:
    result = CliRunner().invoke(main, ["submit", "--address", "http://127.0.0.1:1", "--", "prune", "--sparsty", "1"])
    assert result.exit_code == 2
    assert "No such option '--sparsty'" in result.stderr


@pytest.mark.usefixtures("nobody_starts")
def test_a_secret_in_the_command_and_a_server_that_the_job_will_not_know_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    words = ["submit", "--address", "http://127.0.0.1:1", "prune"]
    assert "pass --env MLFLOW_TRACKING_URI" in CliRunner().invoke(main, words).stderr
    words += ["--tracking-uri", "http://me:secret@host:5000"]
    stderr = CliRunner().invoke(main, words).stderr
    assert stderr.startswith("warning: the command holds a secret")
    assert len(stderr.splitlines()) == 2
    words[3:3] = ["--env", "MLFLOW_TRACKING_URI"]
    assert CliRunner().invoke(main, words[:6]).stderr.startswith("slimllm: no Ray job server answers")


def test_a_job_in_a_copy_of_a_folder_keeps_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://a.zip"}}')
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for output in (None, "pruned/a", str(tmp_path / "a")):
        with pytest.raises(ConfigError, match=r"the output would be in the job's copy of --working-dir"):
            require_lasting_output(output)
    for uri in (None, "sqlite:///mlflow.db"):
        with pytest.raises(ConfigError, match=r"MLflow's database would be in the job's copy of --working-dir"):
            require_lasting_output("/data/a", TrackingOptions(tracking_uri=uri))
    for uri in ("http://host:5000", "sqlite:////data/mlflow.db"):
        require_lasting_output("/data/a", TrackingOptions(tracking_uri=uri))
    require_lasting_output("/data/a")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    require_lasting_output(None, TrackingOptions())


@pytest.mark.usefixtures("local_ray")
def test_a_job_that_cannot_be_told_of_its_run_costs_a_warning(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_gone"}}')
    warnings: list[str] = []
    with tracked_run(TrackingOptions(tracking_uri=tracking_uri), tmp_path / "metrics.jsonl") as run:
        link_with_job(run, warnings.append)
    assert warnings == [
        "the job's metadata could not be written (Ray knows no job raysubmit_gone): "
        "the job does not name its MLflow run, but the run's tags name the job"
    ]
    assert run.run_id is not None
    assert mlflow_run(tracking_uri, run.run_id).data.tags["slimllm.ray_job_id"] == "raysubmit_gone"


# ---- On a cluster


def test_a_job_ends_as_the_command_does_and_mlflow_and_ray_name_each_other(
    head: Head, gqa_model: Path, token_file: Path, tracking_uri: str, tmp_path: Path, other_store: Path
) -> None:
    folder, output = tmp_path / "folder", tmp_path / "out"
    shutil.copytree(gqa_model, folder / "model")
    shutil.copy(token_file, folder / "tokens.parquet")
    fill(folder, ran := tmp_path / "ran")
    words = ["prune", "model", "--calibration", "tokens.parquet", "--output", output, "--workers", "1"]
    env = f"MLFLOW_TRACKING_URI={tracking_uri}"
    stdout, stderr = head.run("submit", "--working-dir", folder, "--env", env, "--", *words)
    job_id = job_of(stderr)
    assert not ran.exists(), ran.read_text()
    assert stderr.splitlines() == [f"job {job_id} on {head.address}", f"job {job_id}: SUCCEEDED"]
    assert "\nlayer similarities: layer 3/3" in stdout
    assert "\npruning: layer 3/3" in stdout
    assert f"checkpoint: {output}" in stdout
    assert (output / "model.safetensors.index.json").exists() or list(output.glob("*.safetensors"))

    state = head.state(job_id)
    assert state["status"] == "SUCCEEDED"
    assert state["exit_code"] == 0
    assert state["words"] == " ".join(map(str, words))
    assert state["mlflow_tracking_uri"] == tracking_uri
    run = mlflow_run(tracking_uri, state["mlflow_run_id"])
    assert (run.info.status, run.data.tags["slimllm.ray_job_id"]) == ("FINISHED", job_id)
    # The job is known to the journal, and to nothing that a result depends on.
    assert (
        job_id not in (output / "pruning" / "plan.json").read_text() + (output / "pruning" / "asked.json").read_text()
    )
    assert not [name for name, value in run.data.params.items() if job_id in name + value]
    elsewhere = f"sqlite:///{other_store / 'mlflow.db'}"
    logged = log_output(output, tracking_uri=elsewhere)
    assert mlflow_run(elsewhere, logged.run_id).data.tags["slimllm.ray_job_id"] == job_id

    table, _ = head.run("jobs", "list", "--address", head.address)
    (line,) = [line for line in table.splitlines() if line.startswith(job_id)]
    assert line.split()[1] == "SUCCEEDED"
    assert line.endswith(f"{state['mlflow_run_id']}  {state['words']}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "1.2", "--output", "/nowhere"], "slimllm: sparsity is 1.2: it must lie between 0 and 1"),
        # Nothing but its line is new (test_a_job_in_a_copy_of_a_folder_keeps_nothing_there).
        pytest.param(
            [],
            "slimllm: the output would be in the job's copy of --working-dir, which Ray deletes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_job_that_is_refused_says_so_here_and_gives_its_exit_code(
    head: Head, tmp_path: Path, words: list[str], said: str
) -> None:
    stdout, stderr = head.run("submit", "--working-dir", tmp_path, "prune", *words, code=2)
    assert stdout.splitlines()[-1].startswith(said), head.log_file(job_of(stderr)).read_text()
    assert stderr.splitlines()[-1] == f"job {job_of(stderr)}: FAILED, exit code 2"


@dataclass(frozen=True)
class Followed:
    """A job that was submitted and is followed, and frozen between two layers.

    Attributes:
        words: What it runs.
        follower: Who submitted it.
        driver: Its process, which is frozen.
    """

    job_id: str
    words: tuple[object, ...]
    follower: Started
    driver: psutil.Process


@pytest.fixture(scope="module")
def followed(
    head: Head, deep_model: Path, token_file: Path, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> Followed:
    output = tmp_path_factory.mktemp("followed") / "out"
    words = ("prune", deep_model, "--calibration", token_file, "--tracking-uri", tracking_uri, "--output", output)
    follower = head.fork("submit", "--", *words)
    wait_for(lambda: "raysubmit_" in follower.printed()[1])
    job_id = job_of(follower.printed()[1])
    # When nothing is being told to MLflow, and the log has what the tests need of it.
    return Followed(job_id, words, follower, head.frozen(output, lambda: layers_logged(tracking_uri, job_id) >= 2))


def test_who_follows_a_job_may_go_and_come_back(head: Head, followed: Followed) -> None:
    job_id, follower, log = followed.job_id, followed.follower, head.log_file(followed.job_id)
    # The log comes while the job runs.
    wait_for(lambda: LAST_SIMILARITY in follower.printed()[0])
    os.killpg(follower.process.pid, signal.SIGINT)
    ended = follower.wait(SECONDS)
    assert ended.code == 130
    assert ended.stderr.splitlines() == [
        f"job {job_id} on {head.address}",
        f"slimllm: job {job_id} keeps running; to follow it: slimllm jobs logs {job_id} --follow; "
        f"to stop it: slimllm jobs stop {job_id}",
    ]
    assert head.state(job_id)["status"] == "RUNNING"

    # A connection that is cut is made again, and nothing is shown twice; a server that is gone is told of.
    proxy, before = Proxy(head.port), log.read_text()
    impatient = "import cluster.jobs; cluster.jobs.LOST_SECONDS = 1.0"
    follower = head.fork("jobs", "logs", job_id, "--follow", "--address", proxy.address, first=impatient)
    wait_for(lambda: follower.printed()[0] == before)
    proxy.cut()
    with log.open("a") as file:
        file.write("after the cut\n")
    wait_for(lambda: follower.printed()[0] == before + "after the cut\n")
    proxy.close()
    ended = follower.wait(SECONDS)
    assert (ended.code, ended.stdout) == (1, before + "after the cut\n"), ended.stderr
    assert ended.stderr.startswith(f"slimllm: no Ray job server answers at {proxy.address}: check --address, ")
    assert f"to follow it: slimllm jobs logs {job_id} --address {proxy.address} --follow; " in ended.stderr
    assert len(ended.stderr.splitlines()) == 1

    # SIGTERM is for who follows, not for the job.
    follower = head.fork("jobs", "logs", job_id, "--follow")
    wait_for(lambda: bool(follower.printed()[0]))
    follower.process.terminate()
    assert follower.wait(SECONDS).code == 143
    assert head.state(job_id)["status"] == "RUNNING"


def test_who_follows_a_job_on_a_terminal_is_asked_and_stops_it(
    head: Head, followed: Followed, tracking_uri: str
) -> None:
    job_id = followed.job_id
    # On a terminal Ctrl-C asks; another one is no answer.
    for answer, code in (("d\n", 130), ("\x03", 130), ("s\n", 143)):
        assert head.state(job_id)["status"] == "RUNNING"
        terminal = Terminal(head, "jobs", "logs", job_id, "--follow")
        terminal.read_to(LAST_SIMILARITY)
        terminal.type("\x03")
        terminal.read_to(f"job {job_id}: stop the job, or detach and leave it running? (s, d): ")
        terminal.type(answer)
        if code == 143:
            thaw_when_told_to_end(followed.driver)
            terminal.read_to("slimllm: terminated; no checkpoint was written")
            terminal.read_to(f"job {job_id}: STOPPED")
        assert terminal.end() == code
    state = head.state(job_id)
    assert state["status"] == "STOPPED"
    assert mlflow_run(tracking_uri, state["mlflow_run_id"]).info.status == "KILLED"


def test_a_job_that_was_stopped_says_so_and_the_next_job_goes_on_with_its_run(
    head: Head, followed: Followed, tracking_uri: str
) -> None:
    job_id = followed.job_id
    # Unless the test before this one has stopped it.
    with suppress(psutil.NoSuchProcess):
        followed.driver.resume()
    assert head.run("jobs", "stop", job_id) == (f"job {job_id}: STOPPED\n", "")
    log, _ = head.run("jobs", "logs", job_id)
    assert "warning" not in log
    assert log.splitlines()[-1].startswith("slimllm: terminated; no checkpoint was written; what was solved is in ")
    assert head.run("jobs", "logs", job_id, "--follow", code=143) == (log, f"job {job_id}: STOPPED\n")
    stopped = head.state(job_id)
    assert mlflow_run(tracking_uri, stopped["mlflow_run_id"]).info.status == "KILLED"

    stdout, stderr = head.run("submit", *followed.words, "--resume")
    assert "\ncontinuing from earlier results" in stdout
    again = head.state(job_of(stderr))
    assert again["mlflow_run_id"] == stopped["mlflow_run_id"]
    run = mlflow_run(tracking_uri, stopped["mlflow_run_id"])
    assert (run.info.status, run.data.tags["slimllm.ray_job_id"]) == ("FINISHED", again["job_id"])


def test_a_job_that_runs_is_stopped(head: Head, deep_model: Path, tmp_path: Path) -> None:
    stdout, stderr = head.run("submit", "--no-follow", "--", "prune", deep_model, "--output", tmp_path / "out")
    job_id = stdout.strip()
    assert stderr == f"to follow it: slimllm jobs logs {job_id} --follow\n"
    driver = head.driver(tmp_path / "out")
    driver.suspend()
    running = head.state(job_id)
    assert (running["status"], running["ended"], running["exit_code"]) == ("RUNNING", None, None)
    stopping = head.fork("jobs", "stop", job_id)
    thaw_when_told_to_end(driver)
    assert stopping.wait(SECONDS) == Ended(0, f"job {job_id}: STOPPED\n", "")
    assert not psutil.pid_exists(driver.pid)


def test_a_job_whose_process_is_killed_ends_as_a_shell_would_say(
    head: Head, deep_model: Path, token_file: Path, tracking_uri: str, tmp_path: Path
) -> None:
    words = ["prune", deep_model, "--calibration", token_file, "--tracking-uri", tracking_uri]
    job_id = head.run("submit", "--no-follow", *words, "--output", tmp_path / "out")[0].strip()
    head.driver(tmp_path / "out").kill()
    _, stderr = head.run("jobs", "logs", job_id, "--follow", code=137)
    assert stderr == f"job {job_id}: FAILED, ended by SIGKILL\n"


def test_a_training_whose_job_is_killed_ends_in_the_next_job_as_if_nothing_had_happened(
    head: Head, prune_model: PruneModel, gqa_model: Path, tmp_path: Path
) -> None:
    words = ["tune", prune_model(gqa_model).output, "--tracking-uri", "none", "--steps", 9, "--batch-size", 4]
    words += ["--evaluate-every", 3, "--patience", 9, "--keep-worse"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ended = CliRunner().invoke(main, [*map(str, words), "--local", "--output", str(whole)])
    assert ended.exit_code == 0, ended.output

    words += ["--workers", 1, "--output", resumed, "--resume"]
    job_id = head.run("submit", "--no-follow", "--", *words)[0].strip()
    head.frozen(resumed, lambda: bool(list(tmp_path.rglob("checkpoint_*")))).kill()
    head.run("jobs", "logs", job_id, "--follow", code=137)
    assert "continuing from earlier results" in head.run("submit", "--", *words)[0]
    plans = [json.loads((output / "pruning" / "plan.json").read_text()) for output in (whole, resumed)]
    first, second = [plan["tuned"][-1]["totals"] for plan in plans]
    assert first["steps"] == second["steps"] == 9
    assert first["loss_after"] == pytest.approx(second["loss_after"], abs=1e-5)


def test_an_evaluation_runs_as_a_job(
    head: Head, prune_model: PruneModel, gqa_model: Path, held_out_file: Path, tmp_path: Path
) -> None:
    models = [gqa_model, prune_model(gqa_model).output]
    words = ["evaluate", *models, "--data", held_out_file, "--tracking-uri", "none"]
    here = CliRunner().invoke(main, [*map(str, words), "--local", "--output", str(tmp_path / "here")])
    assert here.exit_code == 0, here.output
    head.run("submit", "--", *words, "--workers", 2, "--output", tmp_path / "job")
    found = [json.loads((tmp_path / name / "evaluation.json").read_text())["models"] for name in ("here", "job")]
    assert [one["perplexity"][0]["loss"] for one in found[1]] == pytest.approx(
        [one["perplexity"][0]["loss"] for one in found[0]], rel=1e-6
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Authentication required: Unauthorized: Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "wrong" * 8}, "Authentication failed: Forbidden: Invalid authentication token"),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"}, "Token authentication is enabled but Ray couldn't find an "),
    ],
)
def test_without_the_clusters_token_nobody_is_let_in(head: Head, changed: dict[str, str], said: str) -> None:
    # Ray reads these variables when it is imported.
    process = replace(head, environment=head.environment | changed).start("submit", "prune")
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert stderr.startswith(f"slimllm: the job server at {head.address} does not let us in ({said}")
    assert stderr.endswith(
        ": set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to what the cluster has\n"
    )
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("form", ["http://127.0.0.1:{0.port}", "127.0.0.1:{0.port}", "127.0.0.1:{0.head_port}"])
@pytest.mark.parametrize("name", ["--address", "RAY_ADDRESS"])
def test_a_job_server_is_found_in_every_form_that_ray_takes(head: Head, form: str, name: str) -> None:
    address = form.format(head)
    option = ["--address", address] if name == "--address" else []
    unset = {"RAY_API_SERVER_ADDRESS": "", "RAY_ADDRESS": "" if option else address}
    _, stderr = head.run("jobs", "logs", "nonesuch", *option, code=2, **unset)
    assert stderr == f"slimllm: there is no job nonesuch at {head.address}: see `slimllm jobs list`\n"


@pytest.mark.slow
def test_a_job_server_is_found_through_a_ray_client(head: Head) -> None:
    unset = {"RAY_API_SERVER_ADDRESS": "", "RAY_ADDRESS": f"ray://127.0.0.1:{head.client_port}"}
    _, stderr = head.run("jobs", "logs", "nonesuch", code=2, **unset)
    assert stderr.splitlines()[-1] == f"slimllm: there is no job nonesuch at {head.address}: see `slimllm jobs list`"


def test_a_job_or_a_folder_that_is_not_there_or_does_not_fit_is_told_in_one_line(head: Head, tmp_path: Path) -> None:
    for words in (["logs", "nonesuch"], ["logs", "nonesuch", "--follow"], ["stop", "nonesuch"]):
        _, stderr = head.run("jobs", *words, code=2)
        assert stderr == f"slimllm: there is no job nonesuch at {head.address}: see `slimllm jobs list`\n"
    _, stderr = head.run("submit", "--working-dir", tmp_path / "none", "prune", code=2)
    assert stderr == f"slimllm: the working directory {tmp_path / 'none'} is not there: pass a directory\n"
    os.mkfifo(tmp_path / "pipe")
    _, stderr = head.run("submit", "--working-dir", tmp_path, "prune", code=2)
    assert stderr.startswith(f"slimllm: {tmp_path / 'pipe'} is neither a file nor a folder"), stderr
    (tmp_path / "pipe").unlink()
    (tmp_path / "large").write_bytes(os.urandom(101 << 20))
    _, stderr = head.run("submit", "--working-dir", tmp_path, "prune", code=2)
    assert stderr.startswith(f"slimllm: the working directory {tmp_path} is too large for the job server (")
    assert len(stderr.splitlines()) == 1
