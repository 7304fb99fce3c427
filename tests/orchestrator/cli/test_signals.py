"""A signal at any moment ends a run with its exit code, and `--resume` gives the bytes of an undisturbed run."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.conftest import content
from tests.forks import Ended, Forks, slimllm

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
MOMENTS = 10
# Sends itself a signal at the n-th time that it opens, renames or makes a file once it handles signals.
COUNTING = """
import os, signal, sys
moment, number, path = {moment}, {number}, {path!r}
seen = 0

def count(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.listdir", "os.scandir"):
        if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), number)

sys.addaudithook(count)
try:
    exec({program!r})
finally:
    moment = -1
    with open(path, "w") as file:
        file.write(str(seen))
"""
# A run's end that takes long, and a child that takes longer. A signal just before a sleep does not end that sleep, so
# the sleeps are short.
SLOW_END = """
import subprocess, sys, time
from orchestrator.cli.exit_codes import exit_on_error
def wait():
    for _ in range(600):
        time.sleep(0.1)
with exit_on_error():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        print(child.pid, flush=True)
        wait()
    finally:
        print("ending", flush=True)
        wait()
"""
Run = Callable[..., tuple[Ended, int]]


@pytest.fixture
def run(forks: Forks, gqa_model: Path, token_file: Path, tmp_path: Path) -> Run:
    """Run a command that a signal ends at a moment; how it ended, and how many moments it had."""
    asked = ["prune", gqa_model, "--calibration", token_file, "--evaluate", token_file, "--local", "--method", "gram"]

    def run_until(output: Path, moment: int, number: int, *more: object, uri: str = "none") -> tuple[Ended, int]:
        counted = tmp_path / "counted"
        program = slimllm(*asked, "--output", output, "--tracking-uri", uri, *more)
        source = COUNTING.format(moment=moment, number=int(number), path=str(counted), program=program)
        return forks.run(source, PYTHONWARNINGS="ignore"), int(counted.read_text())

    return run_until


def require_ended_and_resumed(
    run: Run, output: Path, moment: int, number: signal.Signals, expected: dict[str, bytes]
) -> None:
    ended, _ = run(output, moment, number)
    assert ended.code == CODES[number], (moment, ended)
    assert "Traceback" not in ended.stderr, (moment, ended.stderr)
    left = {path.name for path in output.parent.iterdir()}
    # The output if it was whole, or what resumes; nothing if nothing was solved.
    assert left in (set(), {output.name}, {f".{output.name}.partial"}), (moment, left)
    resumed, _ = run(output, 0, number, "--resume")
    assert resumed.code == 0, (moment, resumed.stderr)
    assert content(output) == expected, moment
    assert {path.name for path in output.parent.iterdir()} == {output.name}


# `make test` tries the first two moments of one signal.
SLOW = pytest.mark.slow
TRIED = [
    (signal.SIGINT, slice(2)),
    pytest.param(signal.SIGINT, slice(2, None), marks=SLOW),
    pytest.param(signal.SIGTERM, slice(None), marks=SLOW),
    pytest.param(signal.SIGHUP, slice(None), marks=SLOW),
]


@pytest.mark.parametrize(("number", "part"), TRIED)
def test_a_signal_at_any_moment_ends_a_run_that_resumes(
    run: Run, tmp_path: Path, number: signal.Signals, part: slice
) -> None:
    undisturbed, moments = run(tmp_path / "undisturbed" / "out", 0, number)
    assert undisturbed.code == 0, undisturbed.stderr
    assert moments > 10 * MOMENTS
    expected = content(tmp_path / "undisturbed" / "out")
    for moment in random.Random(int(number)).sample(range(1, moments), MOMENTS)[part]:
        folder = tmp_path / str(moment)
        folder.mkdir()
        require_ended_and_resumed(run, folder / "out", moment, number, expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", list(CODES))
def test_no_run_stays_running_in_mlflow(run: Run, tmp_path: Path, number: signal.Signals, other_store: Path) -> None:
    uri = f"sqlite:///{other_store / 'mlflow.db'}"
    _, moments = run(tmp_path / "undisturbed", 0, number, uri=uri)
    for moment in random.Random(int(number)).sample(range(1, moments), 4):
        ended, _ = run(tmp_path / str(moment), moment, number, uri=uri)
        assert ended.code == CODES[number], ended
        client = MlflowClient(uri)
        experiments = [one.experiment_id for one in client.search_experiments()]
        assert not client.search_runs(experiments, "attributes.status = 'RUNNING'"), (moment, ended)


def test_a_second_ctrl_c_ends_a_command_at_once(forks: Forks) -> None:
    started = forks.start(SLOW_END)
    deadline = time.monotonic() + 60
    while not (child := started.printed()[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(2):
        # As a terminal and a process between send one Ctrl-C.
        os.kill(started.process.pid, signal.SIGINT)
    while "ending" not in started.printed()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    assert started.process.is_running(), "one Ctrl-C that came twice ended it"
    begun = time.monotonic()
    os.kill(started.process.pid, signal.SIGINT)
    ended = started.wait(30)
    assert time.monotonic() - begun < 20
    assert (ended.code, ended.stderr) == (130, "slimllm: interrupted twice, ended at once; --resume continues\n")
    time.sleep(0.2)
    # Where nobody asks how it ended, a zombie stays.
    assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE
