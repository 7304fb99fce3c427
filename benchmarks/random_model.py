"""Writes checkpoints of random weights, for benchmarks where only shapes matter."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from slimllm_ops.checkpoint.tensor_index import INDEX

# The options of a shape, and what they are.
SIZES = {
    "hidden": "Hidden size",
    "intermediate": "Intermediate size",
    "layers": "Decoder layers",
    "heads": "Attention heads",
    "kv_heads": "Key/value heads",
}
# Draws a matrix with the given rows and columns.
Matrix = Callable[[int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer."""
        kv_size = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + kv_size + 1) + 3 * self.hidden * self.intermediate

    def config(self) -> LlamaConfig:
        """Return the config of a model of this shape."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )


# The shape of a Llama of 7B parameters.
SEVEN = Shape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32)


def shape_options(default: Shape, of: str = "the model") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a shape; it gets the shape as its argument `shape`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_shape(**arguments: Any) -> None:
            sizes = {name: arguments.pop(name) for name in SIZES}
            command(shape=Shape(**sizes), **arguments)

        for name in reversed(SIZES):
            flag, described = f"--{name.replace('_', '-')}", f"{SIZES[name]} of {of}."
            with_shape = click.option(flag, default=getattr(default, name), help=described)(with_shape)
        return with_shape

    return decorate


def write_model(directory: Path, shape: Shape, device: str = "cpu") -> Path:
    """Write a bfloat16 checkpoint of random weights, one layer per file, with one layer in memory at a time."""
    directory.mkdir(parents=True)
    shape.config().save_pretrained(directory)
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
        return weight.bfloat16().cpu()

    weight_map: dict[str, str] = {}
    for number in range(shape.layers + 1):
        tensors = _outside(shape, matrix) if number == shape.layers else _layer(shape, number, matrix)
        name = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _layer(shape: Shape, layer: int, matrix: Matrix) -> dict[str, Tensor]:
    hidden, kv_size = shape.hidden, shape.hidden * shape.kv_heads // shape.heads
    tensors = {
        "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "self_attn.q_proj.weight": matrix(hidden, hidden),
        "self_attn.k_proj.weight": matrix(kv_size, hidden),
        "self_attn.v_proj.weight": matrix(kv_size, hidden),
        "self_attn.o_proj.weight": matrix(hidden, hidden),
        "mlp.gate_proj.weight": matrix(shape.intermediate, hidden),
        "mlp.up_proj.weight": matrix(shape.intermediate, hidden),
        "mlp.down_proj.weight": matrix(hidden, shape.intermediate),
    }
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _outside(shape: Shape, matrix: Matrix) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
        "lm_head.weight": matrix(shape.vocabulary, shape.hidden),
    }
