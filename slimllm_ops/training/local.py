"""Trains in this process, and keeps the best and the latest checkpoint in a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimllm_ops.files import read_plain, write_json
from slimllm_ops.training.job import TrainingJob
from slimllm_ops.training.outcome import STEP, Outcome, Saved

PREFIX, METRICS = "checkpoint-", "metrics.json"
Tell = Callable[[int, dict[str, float]], None]


class LocalSession:
    """The session of a training in this process (see `slimllm_ops.training.job.Session`).

    Args:
        folder: Where checkpoints are kept.
        tell: Receives the metrics of each step.
    """

    rank, world_size = 0, 1

    def __init__(self, folder: Path, tell: Tell) -> None:
        self._folder, self._tell = folder, tell
        folder.mkdir(parents=True, exist_ok=True)

    def latest(self) -> Path | None:
        """Return the folder of the latest checkpoint."""
        return max(self.saved(), key=_step_of).directory if self.saved() else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Pass the metrics of a step on."""
        self._tell(step, metrics)

    def save(self, checkpoint: Path, metrics: dict[str, Any]) -> None:
        """Copy a checkpoint, and delete those that are neither the best nor the latest."""
        folder = self._folder / f"{PREFIX}{metrics[STEP]}"
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial)
        write_json(partial / METRICS, metrics)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        kept = self.saved()
        best = Outcome(kept, 0).best
        for one in kept:
            if best is not None and one.directory not in (best.directory, folder):
                shutil.rmtree(one.directory)

    def saved(self) -> list[Saved]:
        """Return the checkpoints that are kept."""
        folders = [path for path in self._folder.glob(f"{PREFIX}*") if path.suffix != ".partial"]
        return [Saved(folder, json.loads(read_plain(folder / METRICS, 1 << 20))) for folder in folders]


def fit_here(job: TrainingJob, folder: Path, tell: Tell) -> Outcome:
    """Train in this process; continue if the folder has a checkpoint.

    Args:
        job: The job.
        folder: Where checkpoints are kept.
        tell: Receives the metrics of each step.
    """
    # Imports transformers' trainer, which takes seconds.
    from slimllm_ops.training.loop import run_training

    session = LocalSession(folder, tell)
    ended = run_training(job, session)
    return Outcome(session.saved(), **ended)


def _step_of(saved: Saved) -> int:
    return int(saved.metrics[STEP])
