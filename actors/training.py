"""Trains on Ray: a `TorchTrainer` (Ray Train) whose workers run `slimllm_ops.training.loop`.

    fit_on_ray    in the driver: starts a trainer, and passes the metrics of each step on
    Trainer       an actor that drives Ray Train; to end it ends the training
    RaySession    in each worker: metrics and checkpoints

Ray Train keeps the checkpoints, starts lost workers again from the latest one, and continues a run of the same name
after its driver was lost.
"""

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import ShardError
from actors.waiting import get_one, require_head
from slimllm_ops.training.job import TrainingJob
from slimllm_ops.training.local import Tell
from slimllm_ops.training.outcome import LOSS, STEP, Outcome, Saved

# A training whose workers are lost more often than this ends.
MAX_LOSSES = 3
NAME = "training"
METRICS = "metrics.jsonl"
FOLLOW_SECONDS = 0.5
# How long Ray Train may take to end its workers.
ABORT_SECONDS = 60.0
# How often workers that find no room are started again; Ray Train waits a minute each time.
MAX_STARTS = 3


@dataclass(frozen=True)
class Share:
    """A training's share of the cluster: the number of workers, and the CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: float


@dataclass(frozen=True)
class Task:
    """What a worker gets: the job, and the file that the first worker writes metrics to."""

    job: TrainingJob
    metrics: Path


def fit_on_ray(job: TrainingJob, folder: Path, tell: Tell, share: Share, *, alone: bool) -> Outcome:
    """Train on the cluster that this program is connected to; continue if the folder has an unfinished training.

    Args:
        job: The job.
        folder: Where checkpoints are kept; all nodes see it.
        tell: Receives the metrics of each step, those of an earlier attempt too.
        share: The workers, and what each has.
        alone: Whether the Ray ends with this program.

    Raises:
        ShardError: Workers were lost more than `MAX_LOSSES` times, or failed, or found no room within some minutes.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray Train would take Ctrl-C for itself in this process, and go on after it.
    remote: Any = ray.remote(num_cpus=0)(Trainer)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = remote.options(scheduling_strategy=here).remote()
    process: int = get_one(trainer.process.remote())
    ended = trainer.fit.remote(Task(job, folder / METRICS), folder, share, alone)
    try:
        _follow(ended, folder / METRICS, tell)
        outcome: Outcome | str = get_one(ended)
    except BaseException:
        _abort(process, ended)
        raise
    finally:
        ray.kill(trainer)
    if isinstance(outcome, str):
        raise ShardError(f"the training failed: {outcome}")
    return outcome


def _abort(process: int, ended: Any) -> None:
    """Let Ray Train end its workers and give their resources back, as it does after Ctrl-C."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGINT)
        ray.wait([ended], timeout=ABORT_SECONDS)


def _follow(ended: Any, path: Path, tell: Tell) -> None:
    """Pass on what is written to a file of metrics, until a call has ended."""
    offset, over = 0, False
    while not over:
        done, _ = ray.wait([ended], timeout=FOLLOW_SECONDS)
        over = bool(done)
        lines, offset = read_metrics(path, offset)
        for step, metrics in lines:
            tell(step, metrics)
        if not over and not lines:
            require_head()


class Trainer:
    """An actor that drives Ray Train."""

    def process(self) -> int:
        """Return the id of the actor's process."""
        return os.getpid()

    def fit(self, task: Task, folder: Path, share: Share, alone: bool) -> Outcome | str:
        """Train, or continue the training of a folder; return how it ended, or why it failed."""
        # Ray Train takes seconds to import.
        import ray.train
        from ray.train import CheckpointConfig, FailureConfig, RunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from actors.train_private import TrainerAlone

        # Ray's types are those of the first version of Ray Train.
        limits: dict[str, Any] = {"max_failures": MAX_LOSSES, "controller_failure_limit": MAX_STARTS - 1}
        trainer = (TrainerAlone if alone else TorchTrainer)(
            _train,
            train_loop_config={"task": task},
            torch_config=TorchConfig(backend="nccl" if task.job.on_gpu else "gloo"),
            scaling_config=_scaling(share),
            run_config=RunConfig(
                name=NAME,
                storage_path=str(folder),
                failure_config=FailureConfig(**limits),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute=LOSS, checkpoint_score_order="min"
                ),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            return " ".join(str(error).split())
        saved = [Saved(Path(checkpoint.path), metrics) for checkpoint, metrics in result.best_checkpoints or []]
        # Ray Train's type for a result does not have what the first worker returned.
        return Outcome(saved, **vars(result)["return_value"])


def _scaling(share: Share) -> Any:
    from ray.train import ScalingConfig

    gpus = {"GPU": share.gpus} if share.gpus else {}
    return ScalingConfig(
        num_workers=share.workers,
        use_gpu=bool(gpus),
        resources_per_worker={"CPU": float(share.cpus)} | gpus,
    )


def _train(config: dict[Any, Any]) -> Any:
    """Train in one worker."""
    from slimllm_ops.training.loop import run_training

    task: Task = config["task"]
    return run_training(task.job, RaySession(task.metrics))


class RaySession:
    """A worker's side of Ray Train (see `slimllm_ops.training.job.Session`)."""

    def __init__(self, metrics: Path) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._metrics, self._train = metrics, ray.train

    def latest(self) -> Path | None:
        """Return a copy of the latest checkpoint on this machine; None if there is none."""
        latest = self._train.get_checkpoint()
        return None if latest is None else Path(latest.to_directory(mkdtemp()))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of a step to the file that the driver reads, as one line of JSON."""
        with self._metrics.open("a") as file:
            file.write(json.dumps({STEP: step, "metrics": metrics}) + "\n")

    def save(self, checkpoint: Path, metrics: dict[str, Any]) -> None:
        """Report a checkpoint with its metrics to Ray Train."""
        self._train.report(metrics, self._train.Checkpoint.from_directory(checkpoint))


def read_metrics(path: Path, offset: int) -> tuple[list[tuple[int, dict[str, float]]], int]:
    """Return the metrics of the whole lines after an offset, and where the next line begins."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    told = [(line[STEP], line["metrics"]) for line in map(json.loads, lines)]
    return told, offset + sum(map(len, lines))
