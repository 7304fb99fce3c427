"""Models and data at the limits of floating point: the output is finite and loads, or the error names the layer."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator.pipeline import PruneResult
from slimllm_ops.checkpoint.tensor_index import SINGLE
from slimllm_ops.errors import InputError

Change = Callable[[str, torch.Tensor], None]
METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {},
    "gram": {"method": "gram"},
    "refined": {"method": "gram", "refine": True},
}


def scaled(**factors: float) -> Change:
    """Multiply tensors by a factor, by the modules that they are of."""

    def change(name: str, tensor: torch.Tensor) -> None:
        for module, factor in factors.items():
            if f"{module}.weight" in name:
                tensor *= factor

    return change


def dead_channels(name: str, tensor: torch.Tensor) -> None:
    if "gate_proj" in name:
        tensor[:20] = 0
    if "down_proj" in name:
        tensor[:, 30:] = 0


def constant_features(name: str, tensor: torch.Tensor) -> None:
    if "layernorm" in name:
        tensor[1:] = 0


# The model's settings, a change of its weights, and blocks by tokens of the calibration.
MODELS: dict[str, tuple[dict[str, Any], Change, tuple[int, int]]] = {
    "one of everything but channels": (
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
        scaled(),
        (24, 16),
    ),
    "one channel": ({"intermediate_size": 1}, scaled(), (24, 16)),
    "two tokens": ({}, scaled(), (1, 2)),
    "one token": ({}, scaled(), (1, 1)),
    "dead channels": ({}, dead_channels, (24, 16)),
    "constant features": ({}, constant_features, (24, 16)),
    "dead branches": ({}, scaled(gate_proj=0.0, v_proj=0.0), (24, 16)),
    "dead norms": ({}, scaled(layernorm=0.0), (24, 16)),
    "dead embeddings": ({}, scaled(embed_tokens=0.0), (24, 16)),
    "weights that vanish": ({}, scaled(gate_proj=1e-20, up_proj=1e-20), (24, 16)),
    "huge weights": ({}, scaled(up_proj=1e15), (24, 16)),
    "huge inputs": (
        {},
        scaled(post_attention_layernorm=1e25, gate_proj=1e-25, up_proj=1e-25),
        (24, 16),
    ),
    "float16": ({"dtype": torch.float16}, scaled(down_proj=5e4, gate_proj=1e-3), (24, 16)),
}
SAID = {("huge inputs", "refined"): "layer 0: the activations of mlp hold NaN or infinity: the weights of .* overflow"}
# A run takes seconds: of each model the methods that see something of it that no other test does; the rest is slow.
QUICK = {
    "slimllm": {
        "one of everything but channels",
        "one channel",
        "two tokens",
        "dead channels",
        "huge inputs",
        "float16",
    },
    "gram": {"one channel", "one token", "weights that vanish", "huge weights"},
    "refined": {"two tokens", "dead norms", "dead embeddings", "huge inputs"},
}
CASES = [
    pytest.param(name, method, marks=[] if name in QUICK[method] else pytest.mark.slow)
    for name in MODELS
    for method in METHODS
]


@pytest.fixture
def make_edge(make_llama: Callable[..., Path], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Save one of the models, and its calibration blocks."""

    def make(name: str) -> tuple[Path, Path]:
        settings, change, shape = MODELS[name]
        directory = make_llama(**({"num_key_value_heads": 2} | settings))
        tensors = load_file(directory / SINGLE)
        for key, tensor in tensors.items():
            change(key, tensor)
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        blocks = np.random.default_rng(2).integers(0, 97, size=shape)
        pq.write_table(pa.table({"input_ids": blocks.tolist()}), tmp_path / "blocks.parquet")
        return directory, tmp_path / "blocks.parquet"

    return make


def numbers(described: object) -> Iterator[float]:
    """Yield every fraction of a JSON document."""
    if isinstance(described, dict | list):
        for part in described.values() if isinstance(described, dict) else described:
            yield from numbers(part)
    elif isinstance(described, float):
        yield described


def assert_sound(result: PruneResult, method: str) -> None:
    plan = json.loads((result.output / "pruning" / "plan.json").read_text())
    assert all(map(math.isfinite, numbers(plan)))
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    ((before, after),) = result.totals.perplexity.values()
    assert after < 1.3 * before, method


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_edge(
    prune_model: Callable[..., PruneResult],
    make_edge: Callable[[str], tuple[Path, Path]],
    held_out_file: Path,
    name: str,
    method: str,
) -> None:
    model, blocks = make_edge(name)
    settings = {"calibration": str(blocks), "evaluate": (str(held_out_file),), **METHODS[method]}
    if said := SAID.get((name, method)):
        with pytest.raises(InputError, match=said):
            prune_model(model, **settings)
    else:
        assert_sound(prune_model(model, **settings), method)


def test_dead_modules_go_first(
    prune_model: Callable[..., PruneResult], make_edge: Callable[[str], tuple[Path, Path]]
) -> None:
    """What puts out nothing that varies costs nothing, whatever its weights are."""
    model, blocks = make_edge("dead branches")
    result = prune_model(model, calibration=str(blocks), method="gram", sparsity=0.2)
    plan = json.loads((result.output / "pruning" / "plan.json").read_text())
    decisions = [layer[part] for layer in plan["layers"] for part in ("attention", "mlp") if layer[part]]
    assert decisions
    assert all(decision["relative_error"] == 0 for decision in decisions)


@pytest.mark.parametrize("sparsity", [1e-9, 0.01])
def test_a_sparsity_of_less_than_a_unit(
    prune_model: Callable[..., PruneResult], make_edge: Callable[[str], tuple[Path, Path]], sparsity: float
) -> None:
    model, blocks = make_edge("one channel")
    with pytest.raises(InputError, match=rf"sparsity {sparsity:g} removes nothing: .* ask for at least that"):
        prune_model(model, calibration=str(blocks), sparsity=sparsity)
