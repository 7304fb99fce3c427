"""Checks, before a run, that what stands beside its model's weights can be written beside the pruned ones.

Also that the figures can be drawn.
"""

from orchestrator.inputs import Inputs
from orchestrator.progress import Reporter
from orchestrator.record.figures import require_plain_style
from orchestrator.sources import storage
from slimllm_ops.checkpoint.writing import rehearse
from slimllm_ops.errors import InputError


def require_companions(model: str | None, inputs: Inputs, reporter: Reporter) -> None:
    """Try to write the files beside the weights, and tell what will not come along.

    Raises:
        CheckpointError: A file cannot be copied, the tokenizer cannot be written, or matplotlib cannot be imported.
    """
    require_plain_style()
    with storage.naming_uri(model, inputs.source.directory, InputError):
        lines = rehearse(inputs.source)
    for line in lines:
        reporter.note(line)
