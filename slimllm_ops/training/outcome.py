"""Describes how a training ended, and the checkpoints that it kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The metrics of a checkpoint: the step that it was made after, and its held-out loss, in nats per token that counts.
STEP, LOSS = "step", "validation_loss"


@dataclass(frozen=True)
class Saved:
    """A checkpoint of the trainer, and its metrics."""

    directory: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        saved: The checkpoints that were kept, the best among them.
        steps: The steps that were taken.
        losses: The held-out loss after each step that was evaluated, in nats per token; step 0 is before the training.
        teacher_loss: The teacher's held-out loss; None if there is no teacher.
        diverged_at: The step whose loss or gradient was not finite; None if all were finite.
        peak_memory: Peak bytes of the first worker's GPU; None without a GPU.
    """

    saved: Sequence[Saved]
    steps: int
    losses: dict[int, float] = field(default_factory=dict)
    teacher_loss: float | None = None
    diverged_at: int | None = None
    peak_memory: int | None = None

    @property
    def best(self) -> Saved | None:
        """The checkpoint with the least held-out loss; None if none was kept."""
        return min(self.saved, key=lambda one: one.metrics[LOSS], default=None)
