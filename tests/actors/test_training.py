"""Training on the session's Ray: it does not depend on the number of workers, and survives their loss."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from actors.errors import ShardError
from actors.training import Share, fit_on_ray
from slimllm_ops.training.job import TrainingJob
from slimllm_ops.training.local import fit_here
from slimllm_ops.training.outcome import Outcome
from tests.slimllm_ops.training.jobs import make_job

pytestmark = pytest.mark.usefixtures("local_ray")
ON_TWO = Share(2, 1, 0.0)


def ignore(step: int, metrics: dict[str, float]) -> None:
    """Do nothing with the metrics of a step."""


@pytest.fixture(scope="module")
def job(gqa_model: Path, token_blocks: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return make_job(tmp_path_factory.mktemp("job"), gqa_model, token_blocks, steps=6)


@pytest.fixture(scope="module")
def in_one_process(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return fit_here(job, tmp_path_factory.mktemp("here"), ignore)


def train_workers() -> list[psutil.Process]:
    """The processes of all workers of Ray Train that run for these tests."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def once_at(step: int, event: Callable[[], None]) -> Callable[[int, dict[str, float]], None]:
    """Return what lets something happen when a step is told for the first time."""
    happened = []

    def tell(at: int, metrics: dict[str, float]) -> None:
        if at == step and not happened:
            happened.append(at)
            event()

    return tell


def kill_a_worker() -> None:
    os.kill(train_workers()[0].pid, signal.SIGKILL)


def test_two_workers_that_lose_one_train_as_one_process_does(
    job: TrainingJob, in_one_process: Outcome, tmp_path: Path
) -> None:
    told: dict[int, float] = {}
    killing = once_at(3, kill_a_worker)

    def tell(step: int, metrics: dict[str, float]) -> None:
        told.update({step: metrics["loss"]} if "loss" in metrics else {})
        killing(step, metrics)

    outcome = fit_on_ray(job, tmp_path, tell, ON_TWO, alone=True)
    assert outcome.steps == in_one_process.steps == 6
    assert outcome.losses == pytest.approx(in_one_process.losses, rel=1e-5)
    assert sorted(told) == [1, 2, 3, 4, 5, 6]
    best = outcome.best
    assert best is not None
    assert best.directory.is_dir()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_driver_that_ends_leaves_no_worker_and_its_training_is_continued(
    job: TrainingJob, in_one_process: Outcome, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit_on_ray(job, tmp_path, once_at(4, interrupt), ON_TWO, alone=True)
    psutil.wait_procs(train_workers(), timeout=30)
    assert not train_workers()
    deadline = time.monotonic() + 30
    while (free := ray.available_resources()["CPU"]) < ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free == ray.cluster_resources()["CPU"]
    outcome = fit_on_ray(job, tmp_path, ignore, ON_TWO, alone=True)
    assert outcome.steps == 6
    assert outcome.losses == pytest.approx(in_one_process.losses, rel=1e-5)


def test_a_training_that_fails_says_why(job: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"the training failed: .*no-such-model"):
        fit_on_ray(replace(job, student=tmp_path / "no-such-model"), tmp_path, ignore, ON_TWO, alone=True)
