"""Writes a checkpoint of an earlier version of slimllm again, with the model code and the config of this version."""

from pathlib import Path

from orchestrator.exports import Export
from orchestrator.exports.places import default_directory, open_pruned
from orchestrator.output.staging import open_staging
from slimllm_ops.checkpoint.companions import plan_record
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.files import copy_file, stays_inside
from slimllm_ops.stock import require_same_states

CARD = "README.md"


def export_current(output: Path, path: Path | None, overwrite: bool) -> Export:
    """Write a pruned checkpoint with today's code; its tensors stay as they are.

    Args:
        output: The directory of a pruned checkpoint.
        path: The directory to write; None for `OUTPUT-current` beside the checkpoint.
        overwrite: Whether to replace an existing directory.

    Raises:
        CheckpointError: The checkpoint is missing, broken or not pruned, or a link leads out of it.
        ConfigError: The path is taken, or cannot be written to.
        ReadBackError: The written checkpoint computes something else.
    """
    source, record = open_pruned(output), plan_record(output)
    path = path or default_directory(output, "current")
    # Nothing is removed any more.
    plans = [LayerPlan()] * source.num_layers
    with open_staging(path, overwrite) as staging:
        writer = CheckpointWriter(source, staging.directory)
        for layer, plan in enumerate(plans):
            writer.write_layer(layer, plan)
        writer.finish(plans)
        record.copy(staging.directory)
        if (output / CARD).is_file() and stays_inside(output / CARD, output):
            copy_file(output / CARD, staging.directory / CARD)
        require_same_states(source, Checkpoint.open(staging.directory))
    return Export(path, source.family.class_name, "the same tensors with the model code of this version")
