"""Lists and writes the tensors of a GGUF file: their names, types and order of rows.

Three things are stored differently than in transformers:

- RoPE rotates neighbours (2i, 2i + 1) of a head, not (i, i + W/2), so the rows of each q and k head are interleaved.
- A scaled RoPE is stored as one divisor per frequency (`rope_freqs.weight`), and one amplitude.
- Norms and biases are float32, and float64 becomes float32. Everything else keeps its dtype.

Tensors are listed from the shards' headers, then read, written and released one layer at a time.

Shapes: R rows, D hidden size, W head width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import LayerShape

# llama.cpp's names of the modules of a layer, and of those outside the layers.
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
TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: Its name in llama.cpp.
        source: Its name in the part that it is read with.
        shape: Its shape in the checkpoint.
        dtype: The dtype it is written in.
        heads: The number of heads in its rows if RoPE rotates them, else 0.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    heads: int = 0


@dataclass(frozen=True)
class Part:
    """Tensors that are held in memory together."""

    entries: list[Entry]
    read: Callable[[], dict[str, Tensor]]


def interleave_heads(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of q or k, (R, D) or (R,), with each head's halves interleaved: 0, W/2, 1, W/2 + 1, ..."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def list_parts(checkpoint: Checkpoint, shapes: list[LayerShape], factors: Tensor | None) -> Iterator[Part]:
    """Yield the parts of the file in order: any RoPE factors (W/2,), the layers, then the modules outside them."""
    if factors is not None:
        entry = Entry(ROPE_FREQS, ROPE_FREQS, tuple(factors.shape), torch.float32)
        yield Part([entry], lambda: {ROPE_FREQS: factors})
    for layer, shape in enumerate(shapes):
        prefix = checkpoint.layer_prefix(layer)
        heads = {"self_attn.q_proj": shape.num_attention_heads, "self_attn.k_proj": shape.num_key_value_heads}
        named = {name.removeprefix(prefix): f"blk.{layer}." for name in sorted(checkpoint.layer_names(layer))}
        yield Part(_entries(checkpoint, prefix, named, IN_LAYER, heads), partial(checkpoint.read_layer, layer))
    for module in checkpoint.outside():
        names = sorted(name for name in checkpoint.files if name.rpartition(".")[0] == module)
        named = {name.removeprefix(f"{module}."): "" for name in names}
        outside = {"": OUTSIDE[module]}
        yield Part(_entries(checkpoint, f"{module}.", named, outside, {}), partial(checkpoint.read_module, module))


def _entries(
    checkpoint: Checkpoint, prefix: str, named: dict[str, str], modules: dict[str, str], heads: dict[str, int]
) -> list[Entry]:
    """Return the entries of a part.

    Args:
        checkpoint: The checkpoint that holds them.
        prefix: The start of their names in the checkpoint.
        named: The rest of each name there, and the start of its name in the file.
        modules: llama.cpp's name of each module.
        heads: The number of heads of the modules that RoPE rotates.
    """
    shapes = checkpoint.shapes([prefix + name for name in named])
    dtypes = checkpoint.dtypes([prefix + name for name in named])
    entries = []
    for name, start in named.items():
        module, _, kind = name.rpartition(".")
        shape = shapes[prefix + name]
        dtype = STORED[dtypes[prefix + name]] if len(shape) > 1 else torch.float32
        entries.append(Entry(f"{start}{modules[module]}.{kind}", name, shape, dtype, heads.get(module, 0)))
    return entries


def matrix_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that a checkpoint's matrices are written in."""
    name = checkpoint.layer_prefix(0) + checkpoint.family.mlp.output_weight
    return STORED[checkpoint.dtypes([name])[name]]


def write_parts(writer: Any, kinds: Any, parts: list[Part]) -> None:
    """Write the header, the metadata that was added to the writer, and every tensor.

    Args:
        writer: The gguf package's writer.
        kinds: The gguf package's tensor types, by name.
        parts: The parts of the file, in order.
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
    """Return a tensor's bytes as the file stores them; NumPy need not know its dtype."""
    tensor = tensor.to(entry.dtype)
    if entry.heads:
        tensor = interleave_heads(tensor, entry.heads)
    return tensor.contiguous().view(torch.uint8).numpy()
