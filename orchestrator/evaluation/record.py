"""Records an evaluation: its settings in a file that repeats it, and its figures in MLflow."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from cluster import WorkerPlan
from orchestrator.evaluation.config import EvaluateConfig
from orchestrator.evaluation.inputs import EvaluationInputs
from orchestrator.evaluation.results import ModelResult
from orchestrator.record.params import of_effect, task_params, version_params, versions
from orchestrator.record.run_toml import RUN_FILE
from orchestrator.secrets import masked, masked_all, uris_masked
from orchestrator.settings import Effect
from orchestrator.tracking import Run, stored_parent
from slimllm_ops.files import write_text

OF_AN_ATTEMPT, PLACES = (of_effect(EvaluateConfig, effect) for effect in (Effect.ATTEMPT, Effect.PLACE))


def evaluation_params(config: EvaluateConfig, inputs: EvaluationInputs, workers: WorkerPlan) -> dict[str, Any]:
    """Return an evaluation's settings and what it ran on, without the credentials of addresses."""
    asked = {name: value for name, value in asdict(config).items() if value not in (None, ())}
    listed = {name: ", ".join(map(str, value)) for name, value in asked.items() if isinstance(value, tuple)}
    found = {
        "model_digests": ", ".join(one.digest for one in inputs.models),
        "data_digests": ", ".join(text.blocks.digest for text in inputs.texts_of(inputs.first)),
        "python_version": platform.python_version(),
        **version_params(),
        **task_params(config.tasks, config.task_folder),
        **asdict(workers),
    }
    kept = {name: value for name, value in asked.items() if name not in OF_AN_ATTEMPT}
    return masked_all(kept | listed | found, uris_masked)


def write_run_file(directory: Path, config: EvaluateConfig, inputs: EvaluationInputs, workers: WorkerPlan) -> Path:
    """Write the settings to a TOML file that repeats the evaluation, and return the file."""
    asked = {name: value for name, value in asdict(config).items() if name not in OF_AN_ATTEMPT | PLACES}
    settled = {"workers": workers.num_workers, "gpus_per_worker": workers.gpus_per_worker}
    values = {name: value for name, value in (asked | settled).items() if value is not None}
    lines = [
        f"to repeat this evaluation: slimllm evaluate --config {RUN_FILE} --output DIR",
        *(f"weights of {one.name}: {one.digest}" for one in inputs.models),
        ", ".join(f"{package} {found}" for package, found in versions().items()),
    ]
    header = "".join(f"# {line}\n" for line in map(uris_masked, lines))
    write_text(directory / RUN_FILE, f"{header}\n{tomli_w.dumps(masked_all(values, uris_masked))}")
    return directory / RUN_FILE


def log_inputs(run: Run, params: dict[str, Any], inputs: EvaluationInputs) -> None:
    """Log the parameters and the texts with their digests, before anything is computed."""
    run.log_params(masked_all(params))
    for text in inputs.texts_of(inputs.first):
        blocks, spec = text.blocks, masked(text.blocks.spec)
        number, length = blocks.input_ids_BT.shape
        run.log_dataset(Path(spec).name, blocks.digest, "evaluation", spec, number, length, blocks.num_tokens)


def log_results(run: Run, inputs: EvaluationInputs, results: Sequence[ModelResult]) -> None:
    """Log each model's figures in a run of its own, and in the run that made the model, if its store has it."""
    for model, result in zip(inputs.models, results, strict=True):
        with run.child(result.name) as child:
            child.log_params({"model": masked(result.name), "model_digest": result.digest})
            child.log_metrics({"parameters": result.parameters} | result.metrics())
        if (maker := stored_parent(model.directory)) is not None:
            run.log_evaluated(maker, {f"evaluation/{name}": value for name, value in result.metrics().items()})
