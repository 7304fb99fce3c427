"""What a model directory must hold to be open_shard: every layer, and tensors that fit the model of its config."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slimllm_ops.checkpoint.tensor_index import TensorIndex, open_shard
from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.models.config_checks import wrong_config

# Whoever only reads weights imports this module too, and transformers takes seconds to import.
if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What weights may be stored in, as safetensors calls it.
DTYPES = ("F16", "BF16", "F32", "F64")


def require_layers(index: TensorIndex) -> None:
    """Check that there are tensors of every layer.

    Raises:
        CheckpointError: There are none of a layer; the message names it.
    """
    prefix = f"{index.family.layers}."
    found = {name.removeprefix(prefix).partition(".")[0] for name in index.files if name.startswith(prefix)}
    for layer in range(index.num_layers):
        if str(layer) not in found:
            raise CheckpointError(
                f"{index.directory} has no tensors of layer {layer}, though its config.json names "
                f"{index.num_layers} layers: the checkpoint is incomplete"
            )


def require_fit(index: TensorIndex) -> None:
    """Check that names, shapes and dtypes are those of the model that the config describes.

    Raises:
        CheckpointError: A tensor is missing, or does not fit; the message names it.
    """
    model = _build_on_meta(index.directory, index.config)
    # Tied weights are one parameter of two names, of which the checkpoint may have one.
    for name, parameter in model.named_parameters():
        for held, _ in index.stored_parts(name, tuple(parameter.shape)):
            if held not in index.files:
                described, key = index.place_of(held)
                raise CheckpointError(f"{described} has no {key}: the checkpoint is incomplete")
    modules = {name for name, _ in model.named_modules() if name}
    if unknown := [name for name in index.outside() if name not in modules]:
        raise CheckpointError(
            f"{index.directory} holds tensors of {shown(unknown[0]) or 'no module'}, which a "
            f"{index.config.model_type} model has not: save it anew by transformers' save_pretrained"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored_shapes = (one for name, shape in shapes.items() for one in index.stored_parts(name, shape))
    expected = {name: shape for name, shape in stored_shapes if name in index.files}
    for file_name in sorted({index.files[name] for name in expected}):
        with open_shard(index.directory / file_name) as file:
            for name in [name for name in expected if index.files[name] == file_name]:
                stored = file.get_slice(name)
                _require_stored(index, name, stored.get_dtype(), tuple(stored.get_shape()), expected[name])


def _require_stored(
    index: TensorIndex, name: str, dtype: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    described, key = index.place_of(name)
    if shape != expected:
        raise CheckpointError(f"{described} does not fit its config.json: {key} is {shape}, expected {expected}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{described} holds {key} as {dtype}: pass the model in bfloat16, float16 or float32, not quantised"
        )


def _build_on_meta(directory: Path, config: "PretrainedConfig") -> "PreTrainedModel":
    """Build the model that a config describes, without memory for it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
    # Any: whatever a layer's constructor stumbles over is what the config says of it.
    except Exception as error:
        raise wrong_config(directory, error) from error
    return model
