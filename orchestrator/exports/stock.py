"""Exports a pruned checkpoint to a stock class of transformers and servers, which needs no model code or flag."""

from pathlib import Path

from orchestrator.exports import Export
from orchestrator.exports.places import default_directory
from orchestrator.output.staging import open_staging
from slimllm_ops.checkpoint.companions import plan_record
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stock import stock_form, write_stock


def export_stock(output: Path, path: Path | None, overwrite: bool) -> Export:
    """Write a uniform pruned checkpoint as a stock one.

    Args:
        output: The directory of a pruned checkpoint.
        path: The directory to write; None for `OUTPUT-stock` beside the checkpoint.
        overwrite: Whether to replace an existing directory.

    Raises:
        CheckpointError: The checkpoint is missing or broken, or a link leads out of it.
        InputError: No stock class takes it.
        ConfigError: The path is taken, or cannot be written to.
        ReadBackError: The written checkpoint computes something else.
    """
    source = Checkpoint.open(output)
    form, record = stock_form(source), plan_record(output)
    path = path or default_directory(output, "stock")
    with open_staging(path, overwrite) as staging:
        write_stock(source, form, staging.directory)
        record.copy(staging.directory)
    return Export(path, form.architecture, f"a {form.architecture} that computes the same to the last bit")
