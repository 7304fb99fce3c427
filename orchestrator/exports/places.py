"""Opens and examines the checkpoint that is exported, and names the directory that an export writes."""

from pathlib import Path

from transformers import PretrainedConfig

from slimllm_ops.checkpoint.companions import plan_companions
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError


def open_pruned(output: Path, otherwise: str = "") -> Checkpoint:
    """Open the pruned checkpoint in a directory.

    Args:
        output: The directory.
        otherwise: What takes a model that is not pruned, for the error.

    Raises:
        CheckpointError: The checkpoint is missing, broken or not pruned, or a link leads out of it.
    """
    if not output.is_dir():
        raise CheckpointError(f"{output} is not a directory: pass what slimllm prune wrote")
    checkpoint = Checkpoint.open(output)
    if getattr(checkpoint.config, "num_attention_heads_per_layer", None) is None:
        raise CheckpointError(
            f"{output} is not a pruned model (its type is {checkpoint.config.model_type}): pass what slimllm prune "
            f"wrote{otherwise and f'; {otherwise}'}"
        )
    # An export would hold the content that a link leads to.
    plan_companions(output)
    return checkpoint


def narrow_window(config: PretrainedConfig) -> int | None:
    """Return the width of a model's sliding window; None if it has none, or one that covers the whole context."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return window if window is not None and slides and window < config.max_position_embeddings else None


def default_directory(output: Path, form: str) -> Path:
    """Return the directory `OUTPUT-form` beside a checkpoint's."""
    # The path "." has a name only once it is absolute.
    absolute = output.absolute()
    return absolute.with_name(f"{absolute.name}-{form}")
