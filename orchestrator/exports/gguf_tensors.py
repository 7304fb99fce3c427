"""The tensors of a GGUF file: which there are, in what type and order of rows, and how they are written.

Three things are stored otherwise than transformers stores them:

- RoPE turns neighbours (2i, 2i + 1) of a head, not (i, i + w/2), so the rows of a head of q and k are interleaved.
- A scaled RoPE is a number for each frequency, by which it is divided (`rope_freqs.weight`), and one for its amplitude.
- Norms and biases are float32; so is what was float64. All else has the dtype it had.

Tensors are listed from the shards' headers, then read, written and let go a layer at a time.

Shapes: R rows, D hidden size, W width of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError
from slimllm_ops.models.families import LayerShape

# What llama.cpp calls the modules of a layer, and those outside.
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_FREQS = "rope_freqs.weight"
# Computed anew by whoever loads it; stored in each layer of old checkpoints.
COMPUTED = "self_attn.rotary_emb.inv_freq"
TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: what llama.cpp calls it.
        source: its name in the part it is read with.
        shape: as in the checkpoint.
        dtype: what it is written in.
        heads: how many heads its rows are of, where RoPE turns them; else 0.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    heads: int = 0


@dataclass(frozen=True)
class Part:
    """Tensors that are in memory together."""

    entries: list[Entry]
    read: Callable[[], dict[str, Tensor]]


def interleave_heads(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of q or k, (R, D) or (R,), with the two halves of each head in turns: 0, W/2, 1, W/2 + 1, ..."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def list_parts(checkpoint: Checkpoint, shapes: list[LayerShape], factors: Tensor | None) -> Iterator[Part]:
    """Yield the parts of the file in order: the RoPE factors (W/2,) if there are any, layers, and what is outside."""
    if factors is not None:
        entry = Entry(ROPE_FREQS, ROPE_FREQS, tuple(factors.shape), torch.float32)
        yield Part([entry], lambda: {ROPE_FREQS: factors})
    for layer, shape in enumerate(shapes):
        prefix = checkpoint.layer_prefix(layer)
        heads = {"self_attn.q_proj": shape.num_attention_heads, "self_attn.k_proj": shape.num_key_value_heads}
        named = {name.removeprefix(prefix): f"blk.{layer}." for name in sorted(checkpoint.layer_names(layer))}
        yield Part(_entries(checkpoint, prefix, named, IN_LAYER, heads), partial(checkpoint.read_layer, layer))
    # A head that is stored though it is tied is the embedding once more.
    tied = checkpoint.config.tie_word_embeddings
    for module in (module for module in checkpoint.outside() if not (tied and module == "lm_head")):
        names = sorted(name for name in checkpoint.files if name.rpartition(".")[0] == module)
        named = {name.removeprefix(f"{module}."): "" for name in names}
        outside = {"": OUTSIDE[module]}
        yield Part(_entries(checkpoint, f"{module}.", named, outside, {}), partial(checkpoint.read_module, module))


def _entries(
    checkpoint: Checkpoint, prefix: str, named: dict[str, str], modules: dict[str, str], heads: dict[str, int]
) -> list[Entry]:
    """Return the tensors of a part, by their names after a prefix, and what theirs begin with in the file.

    Raises:
        CheckpointError: there is a tensor that llama.cpp has no place for.
    """
    shapes = checkpoint.shapes([prefix + name for name in named])
    dtypes = checkpoint.dtypes([prefix + name for name in named])
    entries = []
    for name, start in named.items():
        if name == COMPUTED:
            continue
        module, _, kind = name.rpartition(".")
        if module not in modules:
            raise CheckpointError(f"{checkpoint.directory} holds {prefix}{name}, which llama.cpp has no place for")
        shape = shapes[prefix + name]
        dtype = STORED[dtypes[prefix + name]] if len(shape) > 1 else torch.float32
        entries.append(Entry(f"{start}{modules[module]}.{kind}", name, shape, dtype, heads.get(module, 0)))
    return entries


def matrix_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype in which a checkpoint's matrices are written."""
    name = checkpoint.layer_prefix(0) + checkpoint.family.mlp.output_weight
    return STORED[checkpoint.dtypes([name])[name]]


def write_parts(writer: Any, kinds: Any, parts: list[Part]) -> None:
    """Write the header, what the writer was told of the model, and every tensor.

    Args:
        writer: the gguf package's.
        kinds: its numbers of tensors' types, by their names.
        parts: what the file holds.
    """
    for entry in (entry for part in parts for entry in part.entries):
        size = int(np.prod(entry.shape)) * entry.dtype.itemsize
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kinds[TENSOR_TYPES[entry.dtype]]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        tensors = part.read()
        for entry in part.entries:
            writer.write_tensor_data(_file_bytes(tensors.pop(entry.source), entry))


def _file_bytes(tensor: Tensor, entry: Entry) -> np.ndarray:
    """Return a tensor's numbers as they lie in the file, which NumPy need not understand."""
    tensor = tensor.to(entry.dtype)
    if entry.heads:
        tensor = interleave_heads(tensor, entry.heads)
    return tensor.contiguous().view(torch.uint8).numpy()
