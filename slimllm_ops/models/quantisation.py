"""Recognises quantised weights by a config.json, and refuses the schemes that slimllm cannot restore.

It restores float8 weights with a scale for each block, which transformers calls fine-grained fp8.
"""

from typing import Any, NamedTuple

from slimllm_ops.errors import CheckpointError, shown

# Where a config describes quantised weights; the second is an older name of compressed-tensors.
QUANTISED = ("quantization_config", "compression_config")
# How to restore quantised weights with transformers, by scheme. Other schemes cannot be undone.
_BY_CONFIG = "load it with transformers and quantization_config={}(dequantize=True), and save it with save_pretrained"
RESTORED_BY = {
    "bitsandbytes": "load it with transformers, and save what its dequantize() returns with save_pretrained",
    "compressed-tensors": _BY_CONFIG.format("CompressedTensorsConfig"),
    "fp8": _BY_CONFIG.format("FineGrainedFP8Config"),
    "mxfp4": _BY_CONFIG.format("Mxfp4Config"),
}
# What transformers assumes if the config names no size of blocks.
USUAL_BLOCK = (128, 128)


class Blocks(NamedTuple):
    """The rows and columns of the blocks that have a scale each."""

    rows: int
    columns: int


def blocks_of(described: dict[str, Any]) -> Blocks | None:
    """Return the blocks of float8 weights that have a scale each; None if nothing is quantised.

    Raises:
        CheckpointError: The weights are quantised in another way; the message names the scheme and how to undo it.
    """
    for key in QUANTISED:
        if (found := described.get(key)) is None:
            continue
        settings = found if isinstance(found, dict) else {}
        older = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & settings.keys() else None
        scheme = settings.get("quant_method") or older or ("compressed-tensors" if key == QUANTISED[1] else None)
        if key == QUANTISED[0] and scheme == "fp8" and (blocks := _blocks_of_float8(settings)):
            return blocks
        restored = RESTORED_BY.get(str(scheme), "pass the model that it was made from")
        raise CheckpointError(
            f"config.json has a {key}, so its weights are quantised{f' ({shown(str(scheme))})' if scheme else ''}: "
            f"pass the model in bfloat16, float16 or float32; {restored}"
        )
    return None


def _blocks_of_float8(settings: dict[str, Any]) -> Blocks | None:
    """Return the blocks; None for scales that are no plain numbers, and for experts in four bits."""
    plain = settings.get("scale_fmt", "float") == "float" and settings.get("expert_dtype", "fp8") == "fp8"
    size = settings.get("weight_block_size", USUAL_BLOCK)
    # Without blocks, every weight has one scale.
    size = [1 << 31, 1 << 31] if size is None else size
    whole = isinstance(size, list | tuple) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)
    return Blocks(*size) if plain and whole else None
