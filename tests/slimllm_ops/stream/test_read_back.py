"""Reading back accepts what a run wrote, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import ReadBackError
from slimllm_ops.models.families import layer_shape
from slimllm_ops.moments.sums import Mean
from slimllm_ops.stream.passes import LayerStream
from slimllm_ops.stream.read_back import read_back, require_outside_unchanged
from tests.slimllm_ops.naive import random_channels, random_decision

States = tuple[np.ndarray, list[np.ndarray]]


def prune(source: Path, directory: Path, token_ids: torch.Tensor) -> States:
    """Prune a model as a run does; return what it saw: tokens, and states before the first layer and after each."""
    checkpoint = Checkpoint.open(source)
    stream = LayerStream(checkpoint, [token_ids[:2], token_ids[2:4]], torch.device("cpu"))
    writer = CheckpointWriter(checkpoint, directory)
    states, plans = [stream.hidden[0][0].numpy().copy()], []
    shape = layer_shape(checkpoint.config, 0)
    for layer in range(3):
        heads = random_decision(layer, [0], shape.num_attention_units)
        plan = LayerPlan(attention=heads, mlp=random_channels(9, range(3, 40), shape))
        family = checkpoint.family
        for branch, decision in ((family.attention, plan.attention), (family.mlp, plan.mlp)):
            stream.observe(layer, branch)
            stream.apply(layer, branch, decision)
        writer.write_layer(layer, plan)
        plans.append(plan)
        states.append(stream.hidden[0][0].numpy().copy())
    writer.finish(plans)
    return token_ids[0].numpy(), states


def check(directory: Path, seen: States, computed_in: torch.dtype = torch.float32) -> float:
    return read_back(Checkpoint.open(directory), *seen, computed_in)


def change(directory: Path, name: str, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: changed(tensors[name]).contiguous()}, path, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def test_what_was_written_is_accepted(model_dir: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    seen = prune(model_dir, tmp_path, ids)
    assert check(tmp_path, seen) < 1e-5


def test_the_rounding_of_a_16_bit_checkpoint_is_accepted(
    make_model: Callable[..., Path], tmp_path: Path, ids: torch.Tensor
) -> None:
    seen = prune(make_model(dtype=torch.bfloat16), tmp_path, ids)
    # The run computed with recovered weights that were not rounded yet.
    assert 1e-5 < check(tmp_path, seen) < 0.01


@pytest.mark.parametrize(
    ("name", "changed", "described"),
    [
        ("model.embed_tokens.weight", lambda tensor: tensor * 1.01, "the embedding"),
        ("model.layers.0.self_attn.o_proj.bias", lambda tensor: tensor + 0.01, "layer 0"),
        ("model.layers.1.self_attn.q_proj.weight", lambda tensor: tensor.flip(0), "layer 1"),
        ("model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.flip(1), "layer 1"),
        ("model.layers.2.mlp.up_proj.weight", lambda tensor: tensor * 1.001, "layer 2"),
        ("model.layers.2.input_layernorm.weight", torch.zeros_like, "layer 2"),
    ],
)
def test_what_was_changed_is_named(
    gqa_model: Path, tmp_path: Path, ids: torch.Tensor, name: str, changed: Callable, described: str
) -> None:
    seen = prune(gqa_model, tmp_path, ids)
    check(tmp_path, seen)
    change(tmp_path, name, changed)
    with pytest.raises(ReadBackError, match=f"^{described} as written differs by"):
        check(tmp_path, seen)


def test_states_that_are_no_numbers_are_not_accepted(gqa_model: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    token_ids, states = prune(gqa_model, tmp_path, ids)
    states[2][3, 4] = np.nan
    with pytest.raises(ReadBackError, match="layer 1"):
        check(tmp_path, (token_ids, states))


def test_each_layer_starts_from_the_runs_state_so_that_errors_do_not_add_up(
    gqa_model: Path, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids, states = prune(gqa_model, tmp_path, ids)
    # As rounding would, and unlike what the layer before gives.
    states = [(state * np.float32(1 + 1e-6 * layer)).astype(np.float32) for layer, state in enumerate(states)]
    entered = []
    forward = LayerStream.forward

    def noted(self: LayerStream, layer: int) -> Mean:
        entered.append(self.hidden[0][0].numpy().copy())
        return forward(self, layer)

    monkeypatch.setattr(LayerStream, "forward", noted)
    check(tmp_path, (token_ids, states))
    assert len(entered) == 3
    assert all(np.array_equal(found, state) for found, state in zip(entered, states[:3], strict=True))


def test_a_layer_that_adds_nothing_is_accepted(mha_model: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    token_ids, states = prune(mha_model, tmp_path, ids)
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        for kind in ("weight", "bias"):
            change(tmp_path, f"model.layers.2.{module}.{kind}", torch.zeros_like)
    states[3] = states[2].copy()
    assert check(tmp_path, (token_ids, states)) < 1e-5


def test_states_rounded_to_16_bits_are_accepted_where_they_dwarf_what_a_layer_adds(
    mha_model: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    # As on a GPU, for models whose first token has a state of a thousand times the others' norm.
    prune(mha_model, tmp_path, ids)
    change(tmp_path, "model.embed_tokens.weight", lambda tensor: tensor * 1000)
    stream = LayerStream(Checkpoint.open(tmp_path), [ids[:1]], torch.device("cpu"))
    states = []
    for layer in range(4):
        stream.hidden = [stream.hidden[0].bfloat16().float()]
        states.append(stream.hidden[0][0].numpy().copy())
        if layer < 3:
            stream.forward(layer)
    check(tmp_path, (ids[0].numpy(), states), torch.bfloat16)
    with pytest.raises(ReadBackError):
        check(tmp_path, (ids[0].numpy(), states), torch.float32)


def test_what_is_outside_the_layers_must_be_the_sources(model_dir: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    prune(model_dir, tmp_path, ids)
    source = Checkpoint.open(model_dir)
    require_outside_unchanged(source, Checkpoint.open(tmp_path))
    for module in source.outside():
        (name, *_) = source.read_module(module)
        changed = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{module}"))
        change(changed, f"{module}.{name}", lambda tensor: tensor + 1e-3)
        with pytest.raises(ReadBackError, match=rf"{module} as written differs from that of"):
            require_outside_unchanged(source, Checkpoint.open(changed))
