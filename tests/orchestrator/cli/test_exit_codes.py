"""Commands report results and errors to machines as JSON and exit codes, and print more with `--verbose`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner, Result

from orchestrator.cli import main
from orchestrator.cli.exit_codes import exit_on_error
from orchestrator.pipeline import PruneResult
from slimllm_ops.models.families import FAMILIES


def run(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def told(result: Result) -> Any:
    """The one JSON object on stdout."""
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def data(token_file: Path, held_out_file: Path) -> list[object]:
    return ["--calibration", token_file, "--evaluate", held_out_file, "--local"]


def test_a_run_is_told_as_json(gqa_model: Path, data: list[object], tracking_uri: str, tmp_path: Path) -> None:
    words = ["--method", "gram", "--sparsity", 0.2, "--sparsity", 0.4, "--tracking-uri", tracking_uri]
    result = run("prune", gqa_model, *data, *words, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = told(result)
    assert [model["totals"]["sparsity"] for model in found["models"]] == pytest.approx([0.2, 0.4], abs=0.01)
    for model in found["models"]:
        assert (Path(model["output"]) / "config.json").exists()
        (perplexity,) = model["totals"]["perplexity"].values()
        assert perplexity["before"] > 1
        assert perplexity["after"] > 1
        assert model["model_uri"].startswith("models:/")
    assert found["tracking_uri"] == tracking_uri
    assert not found["finished_before"]
    # What is for people goes elsewhere.
    assert "deciding: layer 3/3" in result.stderr

    again = run("prune", gqa_model, *data, *words, "--output", tmp_path / "out", "--json", "--resume")
    assert told(again)["finished_before"]


def test_moments_and_comparisons_are_told_as_json(gqa_model: Path, data: list[object], tmp_path: Path) -> None:
    calibrated = run("calibrate", gqa_model, *data[:2], *data[4:], "--output", tmp_path / "moments", "--json")
    assert told(calibrated) == {"moments": str(tmp_path / "moments")}
    where = ["--tracking-uri", "none", "--output", tmp_path / "compared"]
    compared = told(run("compare", gqa_model, *data, *where, "--method", "gram", "--json"))
    assert {row["method"] for row in compared["rows"]} == {"dense", "slimllm", "gram"}


def test_what_was_pruned_is_logged_and_exported_as_json(gqa_run: PruneResult, tracking_uri: str) -> None:
    logged = told(run("log", gqa_run.output, "--tracking-uri", tracking_uri, "--json"))
    assert logged["run_id"] == gqa_run.run_id
    assert logged["before"]
    refused = run("export", gqa_run.output, "--to", "stock", "--json")
    assert refused.exit_code == 2
    assert "prune with --uniform" in told(refused)["error"]


def test_families_are_told_as_json() -> None:
    assert set(told(run("families", "--json"))) == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "3"], "sparsity is 3.0: it must lie between 0 and 1, both excluded"),
        (["nowhere/at/all"], "model directory "),
        (["--config", "none.toml"], "config file none.toml does not exist"),
    ],
)
def test_an_error_is_told_as_json_and_as_a_line(words: list[str], said: str) -> None:
    result = run("prune", *words, "--json")
    assert result.exit_code == 2
    error = told(result)
    assert error == {"error": error["error"], "exit_code": 2}
    assert error["error"].startswith(said)
    assert result.stderr == f"slimllm: {error['error']}\n"


def test_who_wants_to_know_more_gets_the_traceback_before_the_line() -> None:
    quiet, verbose = run("prune", "--sparsity", "3"), run("prune", "--sparsity", "3", "--verbose")
    assert quiet.stderr.count("\n") == 1
    assert "Traceback" in verbose.stderr
    assert verbose.stderr.endswith(quiet.stderr)


@ray.remote
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("wait", [ray.get, lambda ref: ray.wait([ref], timeout=60)], ids=["get", "wait"])
def test_sigterm_is_told_wherever_it_comes(wait: Callable[[Any], object], capsys: pytest.CaptureFixture[str]) -> None:
    ref = sleep.remote(60)
    before = signal.getsignal(signal.SIGTERM)

    def wait_and_be_told() -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        wait(ref)

    try:
        with pytest.raises(SystemExit) as ended, exit_on_error():
            wait_and_be_told()
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.cancel(ref, force=True)
    assert ended.value.code == 143
    assert capsys.readouterr().err == "slimllm: terminated; no checkpoint was written\n"


# Waits for a signal; what it then prints goes to a terminal that may be gone. It sleeps in short steps: Python calls a
# handler between two of them, also when the signal came just before a sleep, which then does not end early.
WAITING = """
import sys, time
from orchestrator.cli.exit_codes import exit_on_error
with exit_on_error():
    try:
        print("there", flush=True)
        for _ in range(600):
            time.sleep(0.1)
    finally:
        print("cleaning up", file=sys.stderr, flush=True)
"""


# A process of its own has the terminal: what else pytest's process holds or ignores would outlive it.
TERMINAL = """
import fcntl, os, pty, signal, subprocess, sys, termios
mine, its = pty.openpty()
def take_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(its, termios.TIOCSCTTY, 0)
streams = {"stdin": its, "stdout": its, "stderr": its}
process = subprocess.Popen(sys.argv[1:], start_new_session=True, preexec_fn=take_terminal, **streams)
os.close(its)
assert os.read(mine, 100).strip() == b"there"
# As ssh ends.
os.close(mine)
sys.exit(process.wait(timeout=30))
"""


def test_a_terminal_that_is_gone_ends_a_command_with_129() -> None:
    ended = subprocess.run([sys.executable, "-c", TERMINAL, sys.executable, "-c", WAITING], check=False, timeout=60)
    assert ended.returncode == 129


@pytest.mark.parametrize(("ignored", "code"), [(False, 129), (True, 143)])
def test_sighup_is_told_and_nohup_ignores_it(ignored: bool, code: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(0.2)
        process.terminate()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    what = "terminated" if ignored else "the terminal is gone"
    assert stderr == f"cleaning up\nslimllm: {what}; no checkpoint was written\n"


def test_who_wants_to_know_more_is_told_of_every_layer(gqa_model: Path, data: list[object], tmp_path: Path) -> None:
    where = ["--tracking-uri", "none", "--output", tmp_path / "out"]
    result = run("prune", gqa_model, *data, *where, "--verbose")
    layers = [line for line in result.stderr.splitlines() if line.startswith("layer ") and "heads_kept" in line]
    assert [line.split(":")[0] for line in layers] == ["layer 0", "layer 1", "layer 2"]
    assert "checkpoint: " in result.stdout
