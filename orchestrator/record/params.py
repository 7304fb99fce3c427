"""Collects a run's parameters: those that records list, and those that `--resume` compares.

Each setting's declaration decides which it belongs to (`Effect` in orchestrator/settings.py).
"""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.node_state import installed_version
from cluster import WorkerPlan
from orchestrator.config import CompareConfig, PruneConfig
from orchestrator.inputs import Inputs
from orchestrator.secrets import masked_all, uris_masked
from orchestrator.settings import Effect, declared
from orchestrator.version import VERSION
from slimllm_ops.files import digest_files

PACKAGES = ("torch", "transformers", "ray", "mlflow", "datasets")


def of_effect(config: type, effect: Effect) -> frozenset[str]:
    """Return the names of a config's settings with an effect."""
    return frozenset(one.name for one in declared(config).values() if one.effect is effect)


# No record lists these, because each attempt at a run may have its own.
OF_AN_ATTEMPT = of_effect(CompareConfig, Effect.ATTEMPT)
# Results do not depend on these. `weights_travel` is not a setting: it follows from `shared_storage` and the nodes.
PLACES = of_effect(CompareConfig, Effect.PLACE) | {"weights_travel"}
# Settings that name files; the files' digests are compared instead.
DIGESTED = of_effect(CompareConfig, Effect.INPUT)
# The parameters of a logged model in MLflow, if they are set.
TOLD_OF_A_MODEL = (*(one.name for one in declared(CompareConfig).values() if one.tags_models), "model_digest")


def run_params(config: PruneConfig, inputs: Inputs, workers: WorkerPlan) -> dict[str, Any]:
    """Return a run's settings and what it ran on, without the credentials of addresses: enough to repeat it."""
    asked = {
        name: value for name, value in asdict(config).items() if value not in (None, ()) and name not in OF_AN_ATTEMPT
    }
    found = {
        "model": config.model or inputs.name,
        "revision": inputs.model.revision,
        "model_digest": inputs.source_digest,
        "calibration": inputs.calibration.spec,
        "calibration_digest": inputs.calibration.digest,
        "evaluate": ", ".join(blocks.spec for blocks in inputs.held_out),
        "sparsity": ", ".join(f"{sparsity:g}" for sparsity in config.targets if sparsity is not None) or None,
        "python_version": platform.python_version(),
        **version_params(),
        **task_params(config.tasks, config.task_folder),
        **asdict(workers),
    }
    pinned = {name: commit for name, commit in _pinned(inputs).items() if commit}
    return masked_all(asked | found | pinned, uris_masked)


def for_people(params: dict[str, Any]) -> dict[str, Any]:
    """Return a run's parameters with the secrets in names of places and data masked, as a server may show them."""
    return {name: masked_all(value) if name in PLACES | DIGESTED else value for name, value in params.items()}


def settings_of(params: dict[str, Any]) -> dict[str, Any]:
    """Return those of a run's parameters that its result may depend on."""
    return {name: value for name, value in params.items() if name not in PLACES}


def what_is_asked(config: PruneConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what a run's result depends on; a run that resumes it must have the same."""
    settings = {name: value for name, value in asdict(config).items() if name not in OF_AN_ATTEMPT | PLACES | DIGESTED}
    return settings | {
        "sparsity": config.targets,
        "model_digest": inputs.source_digest,
        "calibration_digest": inputs.calibration.digest,
        "evaluate_digests": [blocks.digest for blocks in inputs.held_out],
        "revision": inputs.model.revision,
        **_pinned(inputs),
        **version_params(),
        **task_params(config.tasks, config.task_folder),
    }


def task_params(tasks: tuple[str, ...], folder: str | None) -> dict[str, Any]:
    """Return what the answers to tasks depend on, besides the model: lm-eval, and the files of the tasks' folder."""
    if not tasks:
        return {}
    files = [] if folder is None else sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    digest = None if folder is None else digest_files(Path(folder), files)
    return {"lm_eval_version": installed_version("lm_eval"), "task_digest": digest}


def _pinned(inputs: Inputs) -> dict[str, Any]:
    """Return the data of the hub with their commits; nothing stands for other data."""
    held_out = [blocks.pinned for blocks in inputs.held_out if blocks.pinned]
    return {"calibration_pinned": inputs.calibration.pinned, "evaluate_pinned": ", ".join(held_out) or None}


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on; Ray and MLflow may be missing."""
    found = {package: installed_version(package) for package in PACKAGES}
    return {"slimllm": VERSION} | {package: version for package, version in found.items() if version}


def version_params() -> dict[str, str]:
    """Return the versions of the packages as parameters."""
    return {f"{package}_version": found for package, found in versions().items()}
