"""A pruned checkpoint as one of a class that transformers and servers have: no model code, no flag to load it."""

import shutil
from pathlib import Path

from orchestrator.exports import Export
from orchestrator.output.staging import open_staging
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stock import stock_form, write_stock


def export_stock(output: Path, path: Path | None, overwrite: bool) -> Export:
    """Write a uniform pruned checkpoint as a stock one.

    Args:
        output: a pruned checkpoint.
        path: where it goes; `OUTPUT-stock` beside it if that is None.
        overwrite: whether what is there is replaced.

    Raises:
        CheckpointError: the checkpoint is missing or broken.
        InputError: no stock class takes it.
        ConfigError: the place is taken, or cannot be written to.
        ReadBackError: what was written computes something else.
    """
    source = Checkpoint.open(output)
    form = stock_form(source)
    # Of "." the name is known only once it is absolute.
    absolute = output.absolute()
    path = path or absolute.with_name(f"{absolute.name}-stock")
    with open_staging(path, overwrite) as staging:
        write_stock(source, form, staging.directory)
        if (output / "pruning").is_dir():
            shutil.copytree(output / "pruning", staging.directory / "pruning")
    return Export(path, form.architecture, f"a {form.architecture} that computes the same to the last bit")
