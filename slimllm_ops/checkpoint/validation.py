"""Checks that a model directory holds every layer, and tensors that fit the model in its config."""

from pathlib import Path
from typing import TYPE_CHECKING

from slimllm_ops.checkpoint.float8 import require_scale
from slimllm_ops.checkpoint.tensor_index import TensorIndex, open_shard
from slimllm_ops.errors import CheckpointError
from slimllm_ops.models.config_checks import wrong_config

# Processes that only read weights import this module too, and importing transformers takes seconds.
if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The dtypes that weights may be stored in, by their safetensors names.
DTYPES = ("F16", "BF16", "F32", "F64")


def require_layers(index: TensorIndex) -> None:
    """Check that every layer has tensors.

    Raises:
        CheckpointError: A layer has none; the message names it.
    """
    prefix = f"{index.family.layers}."
    found = {name.removeprefix(prefix).partition(".")[0] for name in index.files if name.startswith(prefix)}
    for layer in range(index.num_layers):
        if str(layer) not in found:
            raise CheckpointError(
                f"{index.directory} has no tensors of layer {layer}, though its config.json names "
                f"{index.num_layers} layers: the checkpoint is incomplete"
            )


def require_fit(index: TensorIndex, model: "PreTrainedModel") -> None:
    """Check that tensor names, shapes and dtypes match the model that the config describes.

    Args:
        index: The tensors.
        model: The model, without weights.

    Raises:
        CheckpointError: A tensor is missing or does not match; the message names it.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # `named_parameters` lists a tied weight once, as the index does. Some activations have constants in buffers.
    needed = (*model.named_parameters(), *((name, one) for name, one in model.named_buffers() if name in shapes))
    for name, tensor in needed:
        for held, _ in index.stored_parts(name, tuple(tensor.shape)):
            if held not in index.files:
                described, key = index.place_of(held)
                raise CheckpointError(f"{described} has no {key}: the checkpoint is incomplete")
    stored_shapes = (one for name, shape in shapes.items() for one in index.stored_parts(name, shape))
    expected = {name: shape for name, shape in stored_shapes if name in index.files}
    for file_name in sorted({index.files[name].file for name in expected}):
        with open_shard(index.directory / file_name) as file:
            for name in [name for name in expected if index.files[name].file == file_name]:
                stored = file.get_slice(index.files[name].name)
                _require_stored(index, name, stored.get_dtype(), tuple(stored.get_shape()), expected[name])


def _require_stored(
    index: TensorIndex, name: str, dtype: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    described, key = index.place_of(name)
    if shape != expected:
        raise CheckpointError(f"{described} does not fit its config.json: {key} is {shape}, expected {expected}")
    if index.files[name].scale is not None:
        require_scale(index, name, dtype, shape)
    elif dtype not in DTYPES:
        raise CheckpointError(
            f"{described} holds {key} as {dtype}: pass the model in bfloat16, float16 or float32, not quantised"
        )


def model_of(directory: Path, config: "PretrainedConfig") -> "PreTrainedModel":
    """Build the model that a config describes, without weights.

    Raises:
        CheckpointError: Transformers cannot build it.
    """
    from slimllm_ops.models.skeleton import build_on_meta

    try:
        return build_on_meta(config)
    # Any exception: whatever makes a layer's constructor fail comes from the config.
    except Exception as error:
        raise wrong_config(directory, error) from error
