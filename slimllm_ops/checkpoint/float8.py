"""Restores weights that are stored as float8, with a factor (`weight_scale_inv`) for each block of the weight."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from slimllm_ops.checkpoint.tensor_index import Place, Scale, TensorIndex, open_shard
from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.models.quantisation import Blocks

FLOAT8 = "F8_E4M3"
SCALES = ("F16", "BF16", "F32")
RESTORED = (torch.float16, torch.bfloat16, torch.float32)
_SCALE, _ACTIVATIONS = "_scale_inv", ".activation_scale"


def with_scales(
    directory: Path, places: dict[str, Place], blocks: Blocks, named: str | torch.dtype | None, layers: str
) -> dict[str, Place]:
    """Return the places of the weights, each with the place of its scale, and without the scales.

    The scales of activations have no use in a model that is restored.

    Args:
        directory: The checkpoint's directory.
        places: The places of weights and scales.
        blocks: The size of the blocks.
        named: The dtype that the config names; weights are restored to it, or to bfloat16 if it is none of theirs.
        layers: The prefix of the decoder layers' names.

    Raises:
        CheckpointError: A scale belongs to no weight, or to one outside the decoder layers.
    """
    dtype = named if isinstance(named, torch.dtype) and named in RESTORED else torch.bfloat16
    weights = {name: place for name, place in places.items() if not name.endswith((_SCALE, _ACTIVATIONS))}
    for name, place in places.items():
        if name.endswith(_SCALE):
            weight = name.removesuffix(_SCALE)
            if weight not in weights:
                raise CheckpointError(f"{directory} stores {shown(name)}, but no {shown(weight)}: download it again")
            if not weight.startswith(f"{layers}."):
                raise CheckpointError(
                    f"{directory} stores {shown(weight)} with a scale: only weights of layers are restored; pass the "
                    f"model in bfloat16, float16 or float32"
                )
            weights[weight] = weights[weight]._replace(scale=Scale(Place(place.file, place.name), blocks, dtype))
    return weights


def tell_of_float8(directory: Path, places: dict[str, Place]) -> Iterator[str]:
    """Yield a warning if weights are restored."""
    dtypes = {str(place.scale.dtype).removeprefix("torch.") for place in places.values() if place.scale is not None}
    if dtypes:
        yield (
            f"{directory} stores weights in float8 with scales: slimllm restores them, and the pruned model is "
            f"stored in {', '.join(dtypes)}"
        )


def require_scale(index: TensorIndex, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Check that a weight with a scale is float8, and that the scale fits it.

    Raises:
        CheckpointError: It does not.
    """
    scale = index.files[name].scale
    assert scale is not None, f"{name} has a scale"
    described, key = index.place_of(name)
    if dtype != FLOAT8 or len(shape) != 2:
        raise CheckpointError(
            f"{described} holds {key} as {dtype} of shape {shape} with a scale: only matrices of {FLOAT8} are "
            f"restored; pass the model in bfloat16, float16 or float32"
        )
    with open_shard(index.directory / scale.place.file) as file:
        stored = file.get_slice(scale.place.name)
        found, kind = tuple(stored.get_shape()), stored.get_dtype()
    expected = _grid(shape, scale.blocks)
    if kind not in SCALES or found not in (expected, (), (1,)):
        raise CheckpointError(
            f"{described} holds the scale of {key} as {kind} of shape {found}, expected {expected} of "
            f"{', '.join(SCALES)} by the weight_block_size in its config.json: pass the model in bfloat16, float16 or "
            f"float32"
        )


def restore(stored_MN: Tensor, factors: Tensor, scale: Scale) -> Tensor:
    """Return a weight times its blocks' factors; both are multiplied in float32, a row of blocks at a time."""
    num_rows, num_columns = stored_MN.shape
    rows, columns = scale.blocks if factors.dim() == 2 else (num_rows, num_columns)
    factors_RC = factors.float().reshape(_grid((num_rows, num_columns), Blocks(rows, columns)))
    restored_MN = torch.empty(stored_MN.shape, dtype=scale.dtype)
    for row, factors_C in zip(range(0, num_rows, rows), factors_RC, strict=True):
        # The last block may be cut off.
        of_columns = factors_C[torch.arange(num_columns) // columns]
        restored_MN[row : row + rows] = stored_MN[row : row + rows].float() * of_columns
    return restored_MN


def _grid(shape: tuple[int, ...], blocks: Blocks) -> tuple[int, int]:
    return -(-shape[0] // blocks.rows), -(-shape[1] // blocks.columns)
