"""Reads whole models of any architecture that transformers has, without running code of their directories.

A pruning needs one layer at a time, and a family that slimllm knows (`reading.py`). To train or to evaluate a model, a
worker holds all of it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimllm_ops.checkpoint.resolution import weight_files
from slimllm_ops.checkpoint.tensor_index import open_shard
from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.models.config_checks import read_config, read_description, wrong_config
from slimllm_ops.models.families import is_supported

# Loading transformers takes seconds.
if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class WholeModel:
    """A model directory, and the sizes by which its memory is estimated.

    Attributes:
        directory: The directory.
        vocab_size: The number of token ids.
        max_length: The longest sequence that the model takes, in tokens; None if its config names none.
        hidden_size: The width of the hidden states.
        num_parameters: The number of scalars in its weight files.
    """

    directory: Path
    vocab_size: int
    max_length: int | None
    hidden_size: int
    num_parameters: int


def inspect_whole(directory: Path) -> WholeModel:
    """Check that transformers can read a directory as a causal language model, and return its sizes.

    Raises:
        CheckpointError: It cannot; the message says why.
    """
    text = read_whole_config(directory).get_text_config()
    return WholeModel(
        directory=directory,
        vocab_size=text.vocab_size,
        max_length=getattr(text, "max_position_embeddings", None),
        hidden_size=getattr(text, "hidden_size", 0),
        num_parameters=sum(_parameters_in(directory / name) for name in weight_files(directory)),
    )


def read_whole(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Return a model with its weights, on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, trust_remote_code=False)


def read_whole_config(directory: Path) -> "PretrainedConfig":
    """Return a model's config.

    Raises:
        CheckpointError: The directory or its config.json is missing or wrong, or is no causal language model's.
    """
    described = read_description(directory)
    if is_supported(described.get("model_type")):
        return read_config(directory)[0]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    # Any exception: transformers raises a dozen types, and the config is always the cause.
    except Exception as error:
        raise wrong_config(directory, error) from error
    _require_causal(directory, config)
    return config


def _require_causal(directory: Path, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{directory} has a model of type {shown(repr(config.model_type))}, which transformers does not know as a "
            f"causal language model: pass one that AutoModelForCausalLM reads"
        )


def _parameters_in(path: Path) -> int:
    with open_shard(path) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
