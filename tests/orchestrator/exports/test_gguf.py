"""llama.cpp computes from an exported file what transformers computes, and the file holds the original tensors.

Reading files needs the package `gguf`, and running them `llama-cpp-python`: pip install -e '.[gguf-test]'.
"""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.models.families import family_named, layer_shape
from tests.orchestrator.exports.gguf_files import (
    BUILDS,
    KINDS,
    ROUNDING,
    assert_same_text,
    assert_same_tokens,
    compare,
    exported,
    fields_of,
    in_turns,
    prune,
    pruned_build,
    tensors_of,
)
from tests.tiny import save_tiny


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", BUILDS)
def test_llama_cpp_computes_what_transformers_does(llama_cpp: Any, tmp_path: Path, build: str, kind: str) -> None:
    directory = pruned_build(build, tmp_path, KINDS[kind])
    compare(llama_cpp, directory, exported(directory), ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "tolerance"), [("lab-llama-11m", 0.01), ("stories260k-gqa", ROUNDING)])
def test_real_models_too(llama_cpp: Any, shared: Path, tmp_path: Path, name: str, tolerance: float, kind: str) -> None:
    # The 11M model is float16, in which llama.cpp multiplies what is stored so; transformers does in float32 here.
    directory = prune(shared / "models" / name, tmp_path / "pruned", KINDS[kind])
    path = exported(directory)
    compare(llama_cpp, directory, path, tolerance)
    assert_same_tokens(llama_cpp, directory, path)
    assert_same_text(llama_cpp, directory, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", BUILDS)
def test_the_file_says_what_each_layer_has(gguf: Any, tmp_path: Path, build: str, kind: str) -> None:
    directory = pruned_build(build, tmp_path, KINDS[kind])
    config = Checkpoint.open(directory).config
    fields = fields_of(gguf, exported(directory))
    assert fields["general.architecture"] == kind
    for name, key in (
        ("attention.head_count", "num_attention_heads_per_layer"),
        ("attention.head_count_kv", "num_key_value_heads_per_layer"),
        ("feed_forward_length", "intermediate_size_per_layer"),
    ):
        numbers = getattr(config, key)
        assert fields[f"{kind}.{name}"] == (numbers if kind == "deci" else numbers[0])
    width = 12 if build == "wide-heads" else 8
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"{kind}.{name}"] == width
    assert fields[f"{kind}.block_count"] == 3
    assert fields[f"{kind}.context_length"] == 64
    assert fields[f"{kind}.vocab_size"] == 97
    assert fields[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert fields["tokenizer.ggml.model"] == "none"
    assert fields["general.name"] == "model-0.2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", ["biases", "qwen2"])
def test_every_tensor_is_there_as_it_was(gguf: Any, tmp_path: Path, build: str, dtype: torch.dtype) -> None:
    directory = pruned_build(build, tmp_path, dtype=dtype)
    path = exported(directory)
    checkpoint, held = Checkpoint.open(directory), tensors_of(gguf, path)
    renamed = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
    }
    renamed |= {f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"}
    renamed |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for layer in range(3):
        shape = layer_shape(checkpoint.config, layer)
        heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}
        for name, tensor in checkpoint.read_layer(layer).items():
            module, _, kind = name.rpartition(".")
            expected = tensor.float().numpy()
            if renamed[module] in heads:
                expected = in_turns(expected, heads[renamed[module]])
            np.testing.assert_array_equal(held.pop(f"blk.{layer}.{renamed[module]}.{kind}"), expected)
    outside = {
        "model.embed_tokens": "token_embd.weight",
        "model.norm": "output_norm.weight",
        "lm_head": "output.weight",
    }
    for module in checkpoint.outside():
        expected = checkpoint.read_module(module)["weight"].float().numpy()
        np.testing.assert_array_equal(held.pop(outside[module]), expected)
    # Llama's own here has a scaled RoPE.
    assert set(held) == ({"rope_freqs.weight"} if build == "biases" else set())
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}
    assert kinds == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype).removeprefix("torch.")]}
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 1} == {"F32"}


def test_a_tied_head_is_the_embedding_though_it_is_stored(gguf: Any, tmp_path: Path) -> None:
    source = save_tiny(family_named("llama"), tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    directory = prune(source, tmp_path / "pruned")
    held = tensors_of(gguf, exported(directory))
    assert "token_embd.weight" in held
    assert "output.weight" not in held


def add_to_layer(directory: Path, name: str) -> None:
    checkpoint = Checkpoint.open(directory)
    CheckpointWriter(checkpoint, directory).write_tensors(2, checkpoint.read_layer(2) | {name: torch.ones(4)})


@pytest.mark.parametrize("name", ["self_attn.rotary_emb.inv_freq", "self_attn.q_norm.weight"])
def test_what_the_model_does_not_have_is_left_out(gguf: Any, pruned: Path, name: str) -> None:
    before = exported(pruned)
    add_to_layer(pruned, name)
    assert exported(pruned, pruned.with_name("after.gguf")).read_bytes() == before.read_bytes()


def test_layers_are_let_go_before_the_next_is_read(gguf: Any, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    read_layer = Checkpoint.read_layer

    def watched(checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
        assert not [one for one in held if one() is not None]
        tensors = read_layer(checkpoint, layer)
        held.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(Checkpoint, "read_layer", watched)
    exported(pruned)
    assert len(held) > 20


def test_the_same_checkpoint_gives_the_same_bytes(gguf: Any, pruned: Path, tmp_path: Path) -> None:
    first, second = exported(pruned), exported(pruned, tmp_path / "second.gguf")
    assert first.read_bytes() == second.read_bytes()


def test_a_window_as_wide_as_the_context_does_not_matter(llama_cpp: Any, tmp_path: Path) -> None:
    source = save_tiny(family_named("mistral"), tmp_path / "dense", sliding_window=64)
    directory = prune(source, tmp_path / "pruned")
    compare(llama_cpp, directory, exported(directory), ROUNDING)
