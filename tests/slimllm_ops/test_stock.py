"""A uniform pruned model equals a model of a stock class, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import InputError, ReadBackError
from slimllm_ops.models.families import FAMILIES, Family, family_named, layer_shape
from slimllm_ops.stock import require_same_states, stock_form, write_stock
from tests.slimllm_ops.naive import random_channels, random_decision
from tests.tiny import save_tiny

CHANNELS = (range(0, 48, 2), range(24, 48), range(24))


def without_bias(decision: Decision | None) -> Decision | None:
    return decision and Decision(decision.kept, decision.scores, decision.recovery, 0.5, with_bias=False)


def prune(source: Path, directory: Path, *, with_bias: bool, heads: bool = True) -> Checkpoint:
    """Prune every layer to the same numbers, though not of the same units."""
    checkpoint = Checkpoint.open(source)
    writer, plans = CheckpointWriter(checkpoint, directory), []
    shape = layer_shape(checkpoint.config, 0)
    units = shape.num_attention_units
    for layer in range(3):
        kept = [unit for unit in range(units) if unit != layer % units]
        attention = random_decision(layer, kept, units) if heads else None
        mlp = random_channels(9 + layer, CHANNELS[layer], shape)
        if not with_bias:
            attention, mlp = without_bias(attention), without_bias(mlp)
        plans.append(LayerPlan(attention=attention, mlp=mlp))
        writer.write_layer(layer, plans[-1])
    writer.finish(plans)
    return Checkpoint.open(directory)


@torch.inference_mode()
def logits(directory: Path, ids: torch.Tensor) -> tuple[PreTrainedModel, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, model(ids).logits


def export(source: Checkpoint, directory: Path, ids: torch.Tensor) -> PreTrainedModel:
    write_stock(source, stock_form(source), directory)
    assert not list(directory.glob("*.py"))
    model, found = logits(directory, ids)
    assert torch.equal(found, logits(source.directory, ids)[1])
    assert type(model).__module__.startswith("transformers.models.")
    return model


# Families whose class derives the width of a head from their number, or whose number must divide the hidden size.
HEADS_STAY = ("opt", "gpt_neox", "gemma2", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_without_new_biases_every_family_is_one_of_its_own_or_a_mistral(
    family: Family, tmp_path: Path, ids: torch.Tensor
) -> None:
    source = save_tiny(family, tmp_path / "dense")
    pruned = prune(source, tmp_path / "pruned", with_bias=False, heads=family.model_type not in HEADS_STAY)
    model = export(pruned, tmp_path / "stock", ids)
    assert type(model).__name__ in (f"{family.name}ForCausalLM", "MistralForCausalLM")
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(pruned.directory).num_parameters()


def test_experts_whose_channels_make_no_whole_rows_are_refused(tmp_path: Path) -> None:
    """The stock classes' own product of all experts at once does not take them."""
    source = Checkpoint.open(save_tiny(family_named("mixtral"), tmp_path / "dense", intermediate_size=44))
    with pytest.raises(InputError, match=r"have 44 channels each, .* multiples of 8: prune with .*--multiple-of 8"):
        stock_form(source)


HEADS_OF_THREE: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}


def test_a_llama_whose_heads_do_not_divide_its_width_is_a_mistral(
    make_model: Callable[..., Path], tmp_path: Path, ids: torch.Tensor
) -> None:
    # 3 heads of 4 on a width of 32.
    pruned = prune(make_model(**HEADS_OF_THREE), tmp_path / "pruned", with_bias=False)
    assert type(export(pruned, tmp_path / "stock", ids)).__name__ == "MistralForCausalLM"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "granite"])
def test_with_new_biases_a_llama_like_model_is_a_granite(model_type: str, tmp_path: Path, ids: torch.Tensor) -> None:
    dense = save_tiny(family_named(model_type), tmp_path / "dense", num_attention_heads=8, num_key_value_heads=4)
    pruned = prune(dense, tmp_path / "pruned", with_bias=True)
    assert type(export(pruned, tmp_path / "stock", ids)).__name__ == "GraniteForCausalLM"


@pytest.mark.parametrize("model_type", ["smollm3", "starcoder2", "seed_oss", "ernie4_5", "nemotron"])
def test_a_family_with_settings_for_biases_takes_new_ones(model_type: str, tmp_path: Path, ids: torch.Tensor) -> None:
    family = family_named(model_type)
    pruned = prune(save_tiny(family, tmp_path / "dense"), tmp_path / "pruned", with_bias=True)
    assert type(export(pruned, tmp_path / "stock", ids)).__name__ == f"{family.name}ForCausalLM"


def test_layers_that_differ_are_refused(gqa_model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(gqa_model)
    writer = CheckpointWriter(checkpoint, tmp_path / "pruned")
    plans = [LayerPlan(mlp=random_decision(1, range(channels), 48)) for channels in (20, 20, 24)]
    for layer, plan in enumerate(plans):
        writer.write_layer(layer, plan)
    writer.finish(plans)
    with pytest.raises(InputError, match=r"layers 0 and 2 of .* differ in shape, .*: prune with --uniform"):
        stock_form(Checkpoint.open(tmp_path / "pruned"))


@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "phi3"])
def test_biases_that_no_class_takes_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    pruned = prune(save_tiny(family_named(model_type), tmp_path / "dense"), tmp_path / "pruned", with_bias=True)
    with pytest.raises(InputError, match=rf"takes .*{model_type}: it has no .*bias.*--uniform --no-bias"):
        stock_form(pruned)


def test_a_window_that_matters_keeps_a_mistral_from_becoming_a_granite(tmp_path: Path) -> None:
    pruned = prune(save_tiny(family_named("mistral"), tmp_path / "dense"), tmp_path / "pruned", with_bias=True)
    with pytest.raises(InputError, match=r"no stock class takes .*mistral: it has no"):
        stock_form(pruned)


def test_a_model_that_computes_something_else_is_found(gqa_model: Path, make_model: Callable[..., Path]) -> None:
    other = make_model(num_key_value_heads=2)
    with pytest.raises(ReadBackError, match=r"differs from the pruned one by .* after layer 0"):
        require_same_states(Checkpoint.open(gqa_model), Checkpoint.open(other))
