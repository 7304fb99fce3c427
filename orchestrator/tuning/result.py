"""Holds what a training gave: its losses, the perplexities, and whether the tuned weights were kept."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.record.totals import HeldOut, metric_suffix
from slimllm_ops.training.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class TuneTotals:
    """The figures of a training.

    Attributes:
        steps: The steps that were taken.
        best_step: The step after which the held-out loss was least; 0 if no step made it less.
        kept: Whether the checkpoint has tuned weights, and not those from before.
        loss_before: The held-out loss before the training, in nats per token that counts.
        loss_after: The same of the best step.
        loss_dense: The same of the dense model; None if it took no part.
        diverged_at: The step whose loss or gradient was not finite; None if all were finite.
        perplexity: Perplexities (dense, before, after) by specification of the held-out text; the dense model's is None
            if it took no part.
        evaluated: The sizes of the held-out texts.
        tokens: The tokens of a pass over the data.
        seconds: Seconds by stage.
        peak_memory: Peak bytes of a worker's GPU; None without a GPU.
    """

    steps: int
    best_step: int
    kept: bool
    loss_before: float
    loss_after: float
    loss_dense: float | None
    diverged_at: int | None
    perplexity: dict[str, tuple[float | None, float, float]]
    evaluated: dict[str, HeldOut]
    tokens: int
    seconds: dict[str, float]
    peak_memory: int | None

    @property
    def recovered(self) -> float | None:
        """The share of the held-out loss beyond the dense model's that came back; None if there was none."""
        return recovered(self.loss_dense, self.loss_before, self.loss_after)

    def recovered_on(self, spec: str) -> float | None:
        """Return the same for the loss on a held-out text."""
        dense, before, after = self.perplexity[spec]
        return recovered(None if dense is None else math.log(dense), math.log(before), math.log(after))

    def reproducible_figures(self) -> dict[str, Any]:
        """Return the figures that a repeated run gives again: all but seconds and memory."""
        figures = asdict(self) | {"recovered": self.recovered}
        return {name: value for name, value in figures.items() if name not in ("seconds", "peak_memory")}

    def metrics(self) -> dict[str, float]:
        """Return the figures as metrics without a step."""
        figures: dict[str, float | None] = {
            "steps": self.steps,
            "best_step": self.best_step,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "loss_dense": self.loss_dense,
            "recovered": self.recovered,
            "peak_gpu_memory_bytes": self.peak_memory,
        }
        figures |= {f"seconds/{stage.replace(',', '')}": value for stage, value in self.seconds.items()}
        for number, (dense, before, after) in enumerate(self.perplexity.values()):
            suffix = metric_suffix(number)
            figures |= {f"perplexity_dense{suffix}": dense, f"perplexity_before{suffix}": before}
            figures[f"perplexity_after{suffix}"] = after
        return {name: value for name, value in figures.items() if value is not None}


def recovered(dense: float | None, before: float, after: float) -> float | None:
    """Return the share of a loss (nats) beyond the dense model's that came back; None if there was none."""
    if dense is None or not before > dense:
        return None
    return (before - after) / (before - dense)


def best_of(outcome: Outcome) -> int:
    """Return the step with the least held-out loss; 0 if that is the loss before the training."""
    finite = {step: loss for step, loss in outcome.losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], step))
