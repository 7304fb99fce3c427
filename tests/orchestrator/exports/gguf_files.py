"""Pruned checkpoints of every build, and the outputs of llama.cpp and transformers for them."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.cli import main
from orchestrator.exports.gguf import export_gguf
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.decide.recovery import Line
from slimllm_ops.models.families import family_named, layer_shape
from tests.tiny import save_tiny

BIASES = {"attention_bias": True, "mlp_bias": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# Every build: the family, and what its config says beside the family's own settings (Llama: llama3's RoPE, tied, GQA).
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "plain-rope": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "biases": ("llama", {**BIASES, "tie_word_embeddings": False}),
    "every-head-its-own": ("llama", {"num_key_value_heads": 4}),
    "wide-heads": ("llama", {"head_dim": 12}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn-of-another-amplitude": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.7}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
}
# Of logits whose standard deviation is 3; float32 against float64 in transformers alone differs by up to 4e-5.
ROUNDING = 5e-4
TEXT = "Don't say 1234567 or  naïve things: it's ünïque,\t🚀 数字 123 \n\n   def f(x):\n    return x  \n I'LL GO."
SOURCE = inspect.getsource(Checkpoint)
TEXTS = (TEXT, SOURCE, "a", " a")


def decision(seed: int, kept: int, units: int, hidden: int) -> Decision:
    """A random choice of units, with a recovery that changes the weights a little and adds a bias that matters."""
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(units, generator=generator)[:kept].tolist())
    scale_D, bias_D = torch.randn(2, hidden, generator=generator, dtype=torch.float64)
    return Decision(tuple(chosen), (0.0,) * units, Line(1 + 0.1 * scale_D, 0.1 * bias_D, 0.0), 0.0)


def free_plans(source: Path) -> list[LayerPlan]:
    """Plans that leave every layer another shape, and some branches as they are."""
    config = Checkpoint.open(source).config
    shape, hidden = layer_shape(config, 0), config.hidden_size
    units, channels = shape.num_attention_units, shape.intermediate_size
    return [
        LayerPlan(
            attention=decision(layer, units - 1 - layer // 3 % 2, units, hidden) if layer % 3 != 1 else None,
            mlp=decision(100 + layer, channels - 5 - layer, channels, hidden) if layer % 3 != 2 else None,
        )
        for layer in range(config.num_hidden_layers)
    ]


def uniform_plans(source: Path) -> list[LayerPlan]:
    """Plans that leave every layer the same shape."""
    config = Checkpoint.open(source).config
    shape, hidden = layer_shape(config, 0), config.hidden_size
    units, channels = shape.num_attention_units, shape.intermediate_size
    return [
        LayerPlan(
            attention=decision(layer, units - 1, units, hidden),
            mlp=decision(100 + layer, channels - 8, channels, hidden),
        )
        for layer in range(config.num_hidden_layers)
    ]


def untouched(source: Path) -> list[LayerPlan]:
    """Plans that take nothing."""
    return [LayerPlan()] * Checkpoint.open(source).num_layers


Plans = Callable[[Path], list[LayerPlan]]
KINDS: dict[str, Plans] = {"deci": free_plans, "llama": uniform_plans}


def prune(source: Path, directory: Path, plans: Plans = free_plans) -> Path:
    writer = CheckpointWriter(Checkpoint.open(source), directory)
    for layer, plan in enumerate(plans(source)):
        writer.write_layer(layer, plan)
    writer.finish(plans(source))
    return directory


def pruned_build(build: str, folder: Path, plans: Plans = free_plans, dtype: torch.dtype = torch.float32) -> Path:
    model_type, settings = BUILDS[build]
    source = save_tiny(family_named(model_type), folder / "dense", **settings)
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(source).to(dtype).save_pretrained(source)
    return prune(source, folder / "model-0.2", plans)


def exported(directory: Path, path: Path | None = None) -> Path:
    """Export it, and return where to."""
    path = path or directory.with_name(f"{directory.name}.gguf")
    export_gguf(directory, path, overwrite=False)
    return path


def fields_of(gguf: Any, path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(gguf: Any, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as float32, in the order of axes that transformers has."""
    held = {}
    for tensor in gguf.GGUFReader(path).tensors:
        bits = np.ascontiguousarray(tensor.data)
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            bits = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        held[tensor.name] = bits.astype(np.float32).reshape([int(size) for size in reversed(tensor.shape)])
    return held


def in_turns(rows: np.ndarray, heads: int) -> np.ndarray:
    """Naive: of each head, row i of the first half goes to 2i, and row i of the second to 2i + 1."""
    turned, width = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            turned[head * width + 2 * i] = rows[head * width + i]
            turned[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return turned


def logits_of(llama_cpp: Any, path: Path, ids: list[int]) -> np.ndarray:
    """What llama.cpp computes, with keys and values in float32 rather than its default of float16."""
    threads = {"n_threads": 1, "n_threads_batch": 1}
    # Without this the program's own lines would be taken for errors.
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, **threads)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.close()
    return logits


def compare(llama_cpp: Any, directory: Path, path: Path, tolerance: float) -> None:
    """Logits agree at every position, and so does the token that comes next."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, size=48).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = logits_of(llama_cpp, path, ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert (found.argmax(1) == expected.argmax(1)).all()


def assert_same_text(llama_cpp: Any, directory: Path, path: Path) -> None:
    """From the same words, the likeliest go on in the same way."""
    words = "Once upon a time, there was a"
    model = llama_cpp.Llama(str(path), n_ctx=64, verbose=False, type_k=0, type_v=0, n_threads=1, n_threads_batch=1)
    found = model.create_completion(words, max_tokens=24, temperature=0.0)["choices"][0]["text"]
    model.close()
    tokenizer, dense = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    whole = dense.float().generate(ids, max_new_tokens=24, do_sample=False)[0]
    assert len(found) > 20
    assert found.strip() == tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True).strip()


def assert_same_tokens(llama_cpp: Any, directory: Path, path: Path, texts: tuple[str, ...] = TEXTS) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in texts:
        found = model.tokenize(text.encode(), add_bos=True, special=False)
        assert tokenizer.convert_ids_to_tokens(found) == tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    model.close()


def refused(*arguments: object) -> str:
    """The one line that a command ends in."""
    result = CliRunner().invoke(main, ["export", *map(str, arguments), "--to", "gguf"])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("slimllm: ")
    return line


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
