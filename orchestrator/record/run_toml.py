"""Writes a run's settings to a TOML file that repeats the run: `slimllm prune --config FILE --output DIR`.

The file has everything that the result depends on, including defaults and choices made during the run, so that a later
version with other defaults, or another number of processors, gives the same result. It leaves out where the result goes
and where it is logged.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs
from orchestrator.record.params import OF_AN_ATTEMPT, PLACES, versions
from orchestrator.secrets import masked_all, uris_masked
from slimllm_ops.files import write_text

RUN_FILE = "run.toml"


def write_run_file(path: Path, command: str, config: PruneConfig, inputs: Inputs, workers: WorkerPlan) -> None:
    """Write a run's settings atomically; the same run writes the same bytes.

    Args:
        path: The file to write; its folder is created if it is missing.
        command: The slimllm command that takes the settings.
        config: The settings asked for.
        inputs: The model and data that the run read.
        workers: The workers that the run chose.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _header(command, inputs) + tomli_w.dumps(_settings(config, inputs, workers))
    write_text(path, text)


def _settings(config: PruneConfig, inputs: Inputs, workers: WorkerPlan) -> dict[str, Any]:
    asked = {name: value for name, value in asdict(config).items() if name not in OF_AN_ATTEMPT | PLACES}
    settled = {
        "sparsity": [sparsity for sparsity in config.targets if sparsity is not None],
        "evaluate": [blocks.pinned or blocks.spec for blocks in inputs.held_out],
        "workers": workers.num_workers,
        "gpus_per_worker": workers.gpus_per_worker,
    }
    # If the moments were read from files and no data pass the model again, the run needs no calibration data.
    if inputs.calibration.blocks is not None:
        settled["calibration"] = inputs.calibration.pinned or inputs.calibration.spec
    repeated = asked | settled | dict(inputs.model.settings)
    return masked_all({name: value for name, value in repeated.items() if value is not None}, uris_masked)


def _header(command: str, inputs: Inputs) -> str:
    """Return comments with what the settings lack: how to use them, the digests of the data, the versions."""
    calibration = inputs.calibration
    lines = [
        f"to repeat this run: slimllm {command} --config {RUN_FILE} --output DIR",
        f"weights of {inputs.name}: {inputs.source_digest}",
        f"tokens of {calibration.spec}, {calibration.num_blocks} x {calibration.block_length}: {calibration.digest}",
        ", ".join(f"{package} {found}" for package, found in versions().items()),
    ]
    return "".join(f"# {line}\n" for line in map(uris_masked, lines)) + "\n"
