"""Describes a training job: all that a worker needs to know. It pickles small; models and data are in files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slimllm_ops.training.losses import Loss

# The files of a data set's folder: token ids (B, T) int32, and which of them count in the loss (B, T) bool.
IDS, COUNTED = "input_ids.npy", "counted.npy"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on some projections (Hu et al. 2021): W + (alpha / rank) B A.

    Attributes:
        rank: The rank of each adapter.
        alpha: The scale of each adapter, times its rank.
        modules: The full names of the projections.
    """

    rank: int
    alpha: int
    modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A training job.

    Attributes:
        student: The checkpoint to train.
        teacher: The dense model; None if the loss has none.
        loss: The loss of a batch, a function of `losses`.
        lora: The adapters to train; None trains all parameters.
        data: The folder of the sequences to train on.
        validation: The folder of the held-out sequences.
        steps: How many steps the optimiser takes.
        batch_size: The sequences of a step, over all workers.
        micro_batch_size: The sequences that a worker passes at once.
        learning_rate: The highest learning rate; it rises for a tenth of the steps, then falls as a cosine.
        evaluate_every: The steps between two evaluations, each with a checkpoint.
        patience: How many evaluations without a better result end the training.
        seed: Seed of the order of the sequences and of the adapters.
        on_gpu: Whether the workers compute on GPUs.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory.
        sharded: Whether parameters are sharded over the workers (FSDP2).
        threads: CPU threads of a worker.
    """

    student: Path
    teacher: Path | None
    loss: Loss
    lora: LoRA | None
    data: Path
    validation: Path
    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    evaluate_every: int
    patience: int
    seed: int
    on_gpu: bool
    gradient_checkpointing: bool
    sharded: bool
    threads: int


class Session(Protocol):
    """What a worker's training tells the outside, and what it starts from."""

    rank: int
    world_size: int

    def latest(self) -> Path | None:
        """Return the folder of the latest checkpoint; None if there is none."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; only the first worker's count."""

    def save(self, checkpoint: Path, metrics: dict[str, Any]) -> None:
        """Keep a checkpoint with its metrics; every worker calls this, with its part of the files."""


Fit = Callable[[TrainingJob], Any]


def write_data(folder: Path, ids_BT: np.ndarray, counted_BT: np.ndarray) -> None:
    """Write a data set's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / IDS, ids_BT)
    np.save(folder / COUNTED, counted_BT)


def read_data(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a data set's token ids and which of them count, mapped from the files."""
    return np.load(folder / IDS, mmap_mode="r"), np.load(folder / COUNTED, mmap_mode="r")
