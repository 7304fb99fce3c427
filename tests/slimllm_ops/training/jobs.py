"""Makes training jobs on tiny models, and reads the metrics that they report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimllm_ops.training.job import LoRA, TrainingJob, write_data
from slimllm_ops.training.losses import cross_entropy

DOWN = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(3))


def make_job(folder: Path, student: Path, blocks_BT: np.ndarray, **settings: Any) -> TrainingJob:
    """Return a job of a few steps on blocks, the last four held out."""
    counted_BT = np.ones(blocks_BT.shape, dtype=bool)
    counted_BT[:, 0] = False
    write_data(folder / "data", blocks_BT[:-4], counted_BT[:-4])
    write_data(folder / "validation", blocks_BT[-4:], counted_BT[-4:])
    defaults: dict[str, Any] = {
        "student": student,
        "teacher": None,
        "loss": cross_entropy,
        "lora": LoRA(2, 4, DOWN),
        "steps": 4,
        "batch_size": 4,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
        "evaluate_every": 2,
        "patience": 10,
        "seed": 0,
        "on_gpu": False,
        "gradient_checkpointing": False,
        "sharded": False,
        "threads": 1,
    }
    return TrainingJob(**(defaults | {"data": folder / "data", "validation": folder / "validation"} | settings))


def values_of(told: Sequence[tuple[int, dict[str, float]]], name: str) -> dict[int, float]:
    """Return the values of a metric by step."""
    return {step: metrics[name] for step, metrics in told if name in metrics}
