"""A run's settings as a TOML file in its output, by which it is repeated: `slimllm prune --config FILE --output DIR`.

It has all that the result depends on, defaults and what was settled on the way included, so that other defaults of a
later version or another number of processors change nothing. Where the result goes and where it is logged are left out.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs
from orchestrator.record.params import OF_AN_ATTEMPT, PLACES, versions
from orchestrator.secrets import masked_all
from slimllm_ops.files import written_whole

RUN_FILE = "run.toml"


def write_run_file(path: Path, command: str, config: PruneConfig, inputs: Inputs, workers: WorkerPlan) -> None:
    """Write the settings of a run, whole or not at all; the same run writes the same bytes.

    Args:
        path: where they go; its folder is made where it is missing.
        command: which of slimllm's commands takes them.
        config: what was asked.
        inputs: the model and the data that were found.
        workers: those that were settled.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _header(command, inputs) + tomli_w.dumps(_settings(config, inputs, workers))
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _settings(config: PruneConfig, inputs: Inputs, workers: WorkerPlan) -> dict[str, Any]:
    asked = {name: value for name, value in asdict(config).items() if name not in OF_AN_ATTEMPT | PLACES}
    settled = {
        "sparsity": [sparsity for sparsity in config.targets if sparsity is not None],
        "evaluate": [blocks.spec for blocks in inputs.held_out],
        "workers": workers.num_workers,
        "gpus_per_worker": workers.gpus_per_worker,
    }
    # Moments that were kept stand for the calibration data, unless those pass the model again.
    if inputs.calibration.blocks is not None:
        settled["calibration"] = inputs.calibration.spec
    return masked_all({name: value for name, value in (asked | settled).items() if value is not None})


def _header(command: str, inputs: Inputs) -> str:
    """Return what the settings do not say: how they are used, and which files and versions the names stood for."""
    calibration = inputs.calibration
    lines = [
        f"to repeat this run: slimllm {command} --config {RUN_FILE} --output DIR",
        f"weights of {inputs.name}: {inputs.source_digest}",
        f"tokens of {calibration.spec}, {calibration.num_blocks} x {calibration.block_length}: {calibration.digest}",
        ", ".join(f"{package} {found}" for package, found in versions().items()),
    ]
    return "".join(f"# {line}\n" for line in masked_all(lines)) + "\n"
