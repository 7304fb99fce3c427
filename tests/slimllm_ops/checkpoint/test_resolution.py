"""What transformers loads from a directory is what is read from it: names, files, tied weights and dtypes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError
from slimllm_ops.models.families import FAMILIES, Family, family_named
from tests.slimllm_ops.checkpoint.source_forms import (
    Change,
    Tensors,
    a_head_below_the_base_model,
    an_index_that_is_out_of_date,
    as_saved,
    in_dtype,
    names_of_the_base_model,
    old_shards_and_a_newer_file,
    only_the_head_is_there,
    rewrite,
    sharded,
    tensors_without_a_place,
    the_head_is_a_copy,
    the_head_is_another,
)
from tests.tiny import save_tiny

UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}


def loaded_by_transformers(directory: Path) -> tuple[Tensors, bool]:
    """Return the tensors that transformers ends with, and whether they are tied."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return {name: tensor for name, tensor in model.state_dict().items() if not tied or "lm_head" not in name}, tied


def read_by_slimllm(checkpoint: Checkpoint) -> Tensors:
    read = {}
    for layer in range(checkpoint.num_layers):
        prefix = checkpoint.layer_prefix(layer)
        read |= {prefix + name: tensor for name, tensor in checkpoint.read_layer(layer).items()}
    for module in checkpoint.outside():
        read |= {f"{module}.{name}": tensor for name, tensor in checkpoint.read_module(module).items()}
    return read


def require_the_same(directory: Path) -> Checkpoint:
    """Check that both read the same tensors, and tie the same."""
    checkpoint = Checkpoint.open(directory)
    expected, tied = loaded_by_transformers(directory)
    read = read_by_slimllm(checkpoint)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name].to(tensor.dtype), tensor), name
    assert checkpoint.config.tie_word_embeddings == tied
    return checkpoint


def named(change: object) -> str | None:
    return getattr(change, "__name__", None) or getattr(change, "name", None)


@pytest.mark.parametrize("settings", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("change", [as_saved, names_of_the_base_model, tensors_without_a_place], ids=named)
@pytest.mark.parametrize("family", FAMILIES, ids=named)
def test_what_transformers_loads_is_what_is_read(
    family: Family, change: Change, settings: dict[str, bool], tmp_path: Path
) -> None:
    change(family, save_tiny(family, tmp_path, num_hidden_layers=2, **settings))
    require_the_same(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (sharded, ""),
        (old_shards_and_a_newer_file, "transformers loads model.safetensors, and so does slimllm"),
        (an_index_that_is_out_of_date, ""),
        (a_head_below_the_base_model, ""),
        (in_dtype(torch.bfloat16), ""),
        (in_dtype(torch.float16), ""),
    ],
    ids=named,
)
def test_in_whatever_files_they_are(model_type: str, change: Change, warning: str, tmp_path: Path) -> None:
    family = family_named(model_type)
    change(family, save_tiny(family, tmp_path, **UNTIED))
    warnings = require_the_same(tmp_path).warnings
    assert [warning in told for told in warnings] == [True] * bool(warning)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (the_head_is_a_copy, ""),
        (the_head_is_another, "the stored values differ: like transformers, slimllm does not tie them"),
        (only_the_head_is_there, ""),
    ],
    ids=named,
)
@pytest.mark.parametrize("family", FAMILIES, ids=named)
def test_weights_are_tied_as_transformers_ties_them(
    family: Family, change: Change, warning: str, tmp_path: Path
) -> None:
    change(family, save_tiny(family, tmp_path, **TIED))
    warnings = require_the_same(tmp_path).warnings
    assert [warning in told for told in warnings] == [True] * bool(warning)


def test_of_tensors_without_a_place_only_the_unexpected_are_told(tmp_path: Path) -> None:
    family = family_named("llama")
    tensors_without_a_place(family, save_tiny(family, tmp_path))
    (warning,) = Checkpoint.open(tmp_path).warnings
    # Three biases in the attention, one in the MLP, and the score; layer 3 and the rotary table.
    assert f"{tmp_path} stores model.layers.1.mlp.down_proj.bias and 5 more, which a llama model" in warning


def test_a_missing_head_is_not_made_up(tmp_path: Path) -> None:
    save_tiny(family_named("llama"), tmp_path, **UNTIED)
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "lm_head" not in name})
    with pytest.raises(CheckpointError, match=r"has no lm_head\.weight: the checkpoint is incomplete"):
        Checkpoint.open(tmp_path)


def test_a_missing_constant_of_an_activation_is_named(tmp_path: Path) -> None:
    save_tiny(family_named("apertus"), tmp_path)
    lost = "model.layers.1.mlp.act_fn.beta"
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(CheckpointError, match=r"layer 1 .* has no mlp\.act_fn\.beta: the checkpoint is incomplete"):
        Checkpoint.open(tmp_path)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    save_tiny(family_named("llama"), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"stores model\.norm\.weight twice, as .* and as"):
        Checkpoint.open(tmp_path)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    save_tiny(family_named("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter .*: merge it into its model with peft's"):
        Checkpoint.open(tmp_path)
