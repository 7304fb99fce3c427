"""Exports a pruned checkpoint as one GGUF file, which llama.cpp loads.

If all layers have the same shape, the file has llama.cpp's `llama` architecture. Otherwise it has `deci`, which stores
the number of heads, key/value heads and channels of each layer. Both compute what a Llama does, with a bias wherever
the checkpoint has one.

Shapes: W head width.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from orchestrator.exports import Export
from orchestrator.exports.gguf_tensors import list_parts, matrix_dtype, write_parts
from orchestrator.exports.gguf_vocabulary import read_vocabulary
from orchestrator.exports.places import narrow_window, open_pruned
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import InputError
from slimllm_ops.files import written_whole
from slimllm_ops.models.families import LayerShape, head_dim, layer_shape
from slimllm_ops.models.transformers_private import llama_rotary

# Model types of the families whose layers are a Llama's.
FAMILIES = ("llama", "mistral", "qwen2")
# RoPE scalings that do not depend on the sequence length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# GGUF's file type for each dtype of the matrices.
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def export_gguf(output: Path, path: Path | None, overwrite: bool) -> Export:
    """Write a pruned checkpoint as a GGUF file, completely or not at all.

    Args:
        output: The directory of a pruned checkpoint.
        path: The file to write; None for `OUTPUT.gguf` beside the checkpoint.
        overwrite: Whether to replace an existing file.

    Raises:
        InputError: The gguf package is missing, the path is taken, or no architecture of llama.cpp fits this model.
        CheckpointError: There is no pruned checkpoint, or it is broken.
    """
    path = path or _default_path(output)
    _require_free(path, overwrite)
    checkpoint = open_pruned(output, "llama.cpp's own convert_hf_to_gguf.py takes dense models")
    _require_supported(checkpoint)
    factors, amplitude = _rope_scaling(checkpoint)
    shapes = [layer_shape(checkpoint.config, layer) for layer in range(checkpoint.num_layers)]
    vocabulary = read_vocabulary(output, checkpoint.config)
    parts = list(list_parts(checkpoint, shapes, factors))
    gguf = _require_package()
    architecture = "llama" if len(set(shapes)) == 1 else "deci"
    with written_whole(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, architecture)
        try:
            writer.add_name(_default_path(output).stem)
            writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[matrix_dtype(checkpoint)]])
            _add_shapes(writer, checkpoint.config, shapes)
            _add_rope(writer, checkpoint.config, amplitude)
            vocabulary.add_to(writer)
            write_parts(writer, gguf.GGMLQuantizationType, parts)
        except OSError as error:
            # NumPy reports a full disk without its errno, and no library names the file.
            raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from error
        finally:
            writer.close()
    return Export(path, architecture, f"of llama.cpp's architecture {architecture}")


def _require_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        missing = "--to gguf needs the package gguf, which is not installed"
        raise InputError(f"{missing}: pip install -e '.[gguf]' in slimllm's checkout") from error
    return gguf


def _default_path(output: Path) -> Path:
    # Do not resolve links: the file goes beside the link. Append the suffix: replacing it would cut model-0.2.
    whole = Path(os.path.abspath(output))  # noqa: PTH100
    return whole.with_name(f"{whole.name}.gguf")


def _require_free(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no directory {path.parent}: make it first")
    if path.is_dir():
        raise InputError(f"--output {path} is a directory: name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another --output, or pass --overwrite to replace it")


def _require_supported(checkpoint: Checkpoint) -> None:
    """Refuse a model that no llama.cpp architecture with per-layer sizes computes."""
    config = checkpoint.config
    if checkpoint.family.model_type not in FAMILIES:
        name = checkpoint.family.name
        raise _refusal(checkpoint, f"{name} is not a Llama in llama.cpp; supported: {', '.join(FAMILIES)}")
    if config.hidden_act not in ("silu", "swish"):
        raise _refusal(checkpoint, f"its hidden_act is {config.hidden_act}, llama.cpp's is silu")
    if (window := narrow_window(config)) is not None:
        raise _refusal(
            checkpoint,
            f"its sliding_window is {window}, of {config.max_position_embeddings} positions, and llama.cpp's "
            f"architectures with per-layer sizes have none",
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise _refusal(checkpoint, f"its RoPE scaling is {kind}; supported: {', '.join(ROPE_TYPES)}")


def _refusal(checkpoint: Checkpoint, reason: str) -> InputError:
    return InputError(f"{checkpoint.directory} cannot become a GGUF file: {reason}")


def _rope_scaling(checkpoint: Checkpoint) -> tuple[Tensor | None, float]:
    """Return the divisors of RoPE's frequencies (W/2,), or None if it is unscaled, and its amplitude."""
    config: Any = checkpoint.config
    rotary, width = llama_rotary(config), head_dim(config)
    if (turned := len(rotary.inv_freq) * 2) != width:
        raise _refusal(checkpoint, f"RoPE rotates {turned} of {width} dimensions per head, llama.cpp all")
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors = plain / rotary.inv_freq.double()
    unscaled = torch.allclose(factors, torch.ones_like(factors), rtol=1e-6)
    return None if unscaled else factors.float(), rotary.attention_scaling


def _add_shapes(writer: Any, config: PretrainedConfig, shapes: list[LayerShape]) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(shapes))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    same = len(set(shapes)) == 1
    for add, name in (
        (writer.add_head_count, "num_attention_heads"),
        (writer.add_head_count_kv, "num_key_value_heads"),
        (writer.add_feed_forward_length, "intermediate_size"),
    ):
        numbers = [getattr(shape, name) for shape in shapes]
        add(numbers[0] if same else numbers)


def _add_rope(writer: Any, config: PretrainedConfig, amplitude: float) -> None:
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if amplitude != 1:
        writer.add_rope_scaling_attn_factors(amplitude)
