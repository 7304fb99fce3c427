"""Collects a training's parameters: those that records list, and those that `--resume` compares."""

import platform
from dataclasses import asdict
from typing import Any

from cluster import WorkerPlan
from orchestrator.record.params import of_effect, version_params
from orchestrator.secrets import masked_all, uris_masked
from orchestrator.settings import Effect
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.inputs import TuneInputs

OF_AN_ATTEMPT, PLACES, DIGESTED = (
    of_effect(TuneConfig, effect) for effect in (Effect.ATTEMPT, Effect.PLACE, Effect.INPUT)
)


def tune_params(config: TuneConfig, inputs: TuneInputs, workers: WorkerPlan) -> dict[str, Any]:
    """Return a training's settings and what it ran on, without the credentials of addresses: enough to repeat it."""
    asked = {
        name: value for name, value in asdict(config).items() if value not in (None, ()) and name not in OF_AN_ATTEMPT
    }
    found = {
        "checkpoint": config.checkpoint,
        "teacher": inputs.teacher and str(config.teacher or inputs.teacher.directory.name),
        "data": inputs.data.spec,
        "validation": inputs.validation.spec,
        "evaluate": ", ".join(blocks.spec for blocks in inputs.held_out),
        "learning_rate": config.peak_learning_rate,
        "batch_size": config.sequences_per_step,
        "python_version": platform.python_version(),
        **_digests(inputs),
        **version_params(),
        **asdict(workers),
    }
    if not config.with_adapters:
        asked = {name: value for name, value in asked.items() if name not in ("rank", "alpha")}
    return masked_all(asked | {name: value for name, value in found.items() if value is not None}, uris_masked)


def settings_of(params: dict[str, Any]) -> dict[str, Any]:
    """Return those of a training's parameters that its result may depend on."""
    return {name: value for name, value in params.items() if name not in PLACES | {"weights_travel"}}


def what_is_asked(config: TuneConfig, inputs: TuneInputs) -> dict[str, Any]:
    """Return what a training's result depends on; a run that resumes it must have the same."""
    settings = {name: value for name, value in asdict(config).items() if name not in OF_AN_ATTEMPT | PLACES | DIGESTED}
    return settings | _digests(inputs) | version_params()


def _digests(inputs: TuneInputs) -> dict[str, Any]:
    return {
        "checkpoint_digest": inputs.digest,
        "teacher_digest": inputs.teacher_digest,
        "data_digest": inputs.data.digest,
        "data_pinned": inputs.data.pinned,
        "validation_digest": inputs.validation.digest,
        "evaluate_digests": [blocks.digest for blocks in inputs.held_out],
    }
