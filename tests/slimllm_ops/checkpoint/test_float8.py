"""Weights in float8 with scales are read as transformers restores them, and those that it cannot be are refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tensor_index import INDEX, SINGLE
from slimllm_ops.errors import CheckpointError, NonFiniteError
from slimllm_ops.models.families import FAMILIES, Family, family_named
from tests.slimllm_ops.checkpoint.source_forms import Tensors, rewrite
from tests.slimllm_ops.checkpoint.test_resolution import read_by_slimllm
from tests.tiny import save_tiny

BLOCK = (16, 8)
# Every one is a whole number of blocks: only then does transformers restore what the scales say.
SIZES = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 2, "dtype": torch.bfloat16}
FLOAT8_MAX = 448.0


def quantised(weight_MN: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return a weight in float8, and its scales: one for each block, or one for all."""
    rows, columns = block or weight_MN.shape
    stored_MN = torch.empty(weight_MN.shape, dtype=torch.float8_e4m3fn)
    shape = -(-weight_MN.shape[0] // rows), -(-weight_MN.shape[1] // columns)
    scales_RC = torch.empty(shape)
    for r in range(shape[0]):
        for c in range(shape[1]):
            part = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
            scales_RC[r, c] = weight_MN[part].float().abs().max() / FLOAT8_MAX
            stored_MN[part] = (weight_MN[part].float() / scales_RC[r, c]).to(torch.float8_e4m3fn)
    return stored_MN, scales_RC if block else scales_RC.squeeze()


def in_float8(family: Family, directory: Path, block: tuple[int, int] | None = BLOCK) -> None:
    """Quantise every matrix of the layers, but for routers."""

    def change(tensors: Tensors) -> Tensors:
        changed = {}
        for name, tensor in tensors.items():
            changed[name] = tensor
            if name.startswith(f"{family.layers}.") and tensor.dim() == 2 and not name.endswith("gate.weight"):
                changed[name], changed[f"{name}_scale_inv"] = quantised(tensor, block)
        return changed

    rewrite(directory, change)
    describe(directory, {"weight_block_size": block})


def describe(directory: Path, settings: dict[str, Any]) -> None:
    path = directory / "config.json"
    described = json.loads(path.read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"} | settings
    path.write_text(json.dumps(described | {"quantization_config": settings}))


def loaded_by_transformers(directory: Path) -> PreTrainedModel:
    restoring = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", quantization_config=restoring)


def saved_by_transformers(directory: Path, restored: Path) -> None:
    """Save the model that transformers restores, with a config that says nothing of float8."""
    model = loaded_by_transformers(directory)
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(model.config)(**config), dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(restored)


def require_the_same(directory: Path) -> Checkpoint:
    """Check that the weights are those that transformers ends with, bit by bit."""
    checkpoint = Checkpoint.open(directory)
    expected = loaded_by_transformers(directory).state_dict()
    if checkpoint.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    read = read_by_slimllm(checkpoint)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype == torch.bfloat16, name
        assert torch.equal(read[name], tensor), name
    return checkpoint


@pytest.mark.parametrize("block", [BLOCK, None], ids=["blocks", "one scale"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_float8_is_restored_as_transformers_restores_it(
    family: Family, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path, **SIZES)
    in_float8(family, tmp_path, block)
    checkpoint = require_the_same(tmp_path)
    assert any("stores weights in float8 with scales" in line for line in checkpoint.warnings)
    assert not hasattr(checkpoint.config, "quantization_config")
    assert checkpoint.dtype == torch.bfloat16


def restored_naively(directory: Path, block: tuple[int, int]) -> Tensors:
    """Return the weights that have scales, each value times the scale of the block that it is in."""
    tensors = load_file(directory / SINGLE)
    restored = {}
    for name, scales_RC in tensors.items():
        if name.endswith("_scale_inv"):
            stored_MN = tensors[name.removesuffix("_scale_inv")].float()
            for m in range(stored_MN.shape[0]):
                for n in range(stored_MN.shape[1]):
                    stored_MN[m, n] *= scales_RC[m // block[0], n // block[1]]
            restored[name.removesuffix("_scale_inv")] = stored_MN.to(torch.bfloat16)
    return restored


def test_the_last_blocks_may_be_cut_off(tmp_path: Path) -> None:
    # Transformers refuses some of these on a CPU, and takes other blocks than the scales are of for the rest.
    family, block = family_named("llama"), (20, 9)
    save_tiny(family, tmp_path, **SIZES)
    in_float8(family, tmp_path, block)
    read, expected = read_by_slimllm(Checkpoint.open(tmp_path)), restored_naively(tmp_path, block)
    assert len(expected) == 14
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def test_blocks_are_of_the_usual_size_unless_named(tmp_path: Path) -> None:
    family = family_named("llama")
    save_tiny(family, tmp_path, **SIZES | {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64})
    in_float8(family, tmp_path, (128, 128))
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    del described["quantization_config"]["weight_block_size"]
    path.write_text(json.dumps(described))
    require_the_same(tmp_path)


def test_a_scale_may_be_in_another_file_and_some_weights_have_none(tmp_path: Path) -> None:
    family = family_named("qwen2")
    save_tiny(family, tmp_path, **SIZES)
    in_float8(family, tmp_path)

    def change(tensors: Tensors) -> Tensors:
        # As `modules_to_not_convert` says, and with scales of activations, which have no use.
        kept = "model.layers.1.mlp.up_proj.weight"
        tensors[kept] = tensors[kept].to(torch.bfloat16)
        del tensors[f"{kept}_scale_inv"]
        return tensors | {f"{kept.removesuffix('.weight')}.activation_scale": torch.ones(())}

    rewrite(tmp_path, change)
    describe(tmp_path, {"weight_block_size": BLOCK, "modules_to_not_convert": ["model.layers.1.mlp.up_proj"]})
    whole = Checkpoint.open(tmp_path)
    assert len(whole.warnings) == 1
    tensors = load_file(tmp_path / SINGLE)
    files = {name: "b.safetensors" if name.endswith("_scale_inv") else "a.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    sharded = require_the_same(tmp_path)
    before = sharded.digest()
    # The size is that of the restored weights, two bytes each.
    assert sharded.num_bytes() == pytest.approx(2 * sharded.num_parameters(list(sharded.files)), rel=0.2)
    rescaled = {name: tensor * 2 for name, tensor in load_file(tmp_path / "b.safetensors").items()}
    save_file(rescaled, tmp_path / "b.safetensors", {"format": "pt"})
    assert Checkpoint.open(tmp_path).digest() != before


KEY = "model.layers.1.self_attn.q_proj.weight"


def without_its_scale(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != f"{KEY}_scale_inv"}


def with_scale(scale: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{KEY}_scale_inv": scale}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_its_scale, r"layer 1 of .* holds self_attn.q_proj.weight as F8_E4M3: pass the model in bfloat16"),
        (lambda tensors: tensors | {KEY: tensors[KEY].to(torch.bfloat16)}, r"as BF16 of shape \(64, 32\) with a scale"),
        (lambda tensors: tensors | {KEY: tensors[KEY].to(torch.float8_e5m2)}, "as F8_E5M2 of shape"),
        (with_scale(torch.ones(4, 2)), r"as F32 of shape \(4, 2\), expected \(4, 4\)"),
        (with_scale(torch.ones(4, 4).to(torch.uint8)), r"as U8 of shape \(4, 4\), expected"),
        (with_scale(torch.full((4, 4), float("nan"))), "holds NaN or infinity in self_attn.q_proj.weight"),
        (
            lambda tensors: tensors | {"lm_head.weight_scale_inv": torch.ones(1)},
            "lm_head.weight with a scale: only weights of layers are restored",
        ),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if name != KEY},
            "stores model.layers.1.self_attn.q_proj.weight_scale_inv, but no model.layers.1.self_attn.q_proj.weight",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(change: Callable[[Tensors], Tensors], says: str, tmp_path: Path) -> None:
    family = family_named("mistral")
    save_tiny(family, tmp_path, **SIZES, tie_word_embeddings=False)
    in_float8(family, tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises((CheckpointError, NonFiniteError), match=says):
        Checkpoint.open(tmp_path).read_layer(1)


def test_a_reference_to_a_weight_travels(tmp_path: Path) -> None:
    family = family_named("mixtral")
    save_tiny(family, tmp_path, **SIZES)
    in_float8(family, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    for name in (family.mlp.output_weight, family.attention.output_weight):
        reference = pickle.loads(pickle.dumps(checkpoint.stored_weight(1, name)))
        assert torch.equal(reference.read(), checkpoint.read_layer(1)[name])
