"""Plain transformers loads a written checkpoint, which computes what the masked dense model computes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.decide.recovery import Line
from slimllm_ops.errors import CheckpointError, NonFiniteError
from slimllm_ops.models.config_checks import PER_LAYER_KINDS
from slimllm_ops.models.families import layer_shape
from tests.elsewhere import Elsewhere
from tests.slimllm_ops.naive import mask_again, masked_model, random_channels, random_decision


def write(source: Path, directory: Path, plans: list[LayerPlan]) -> Path:
    directory.mkdir()
    writer = CheckpointWriter(Checkpoint.open(source), directory)
    number = 0
    for layer, plan in enumerate(plans):
        if not plan.dropped:
            writer.write_layer(layer, plan, number)
            number += 1
    writer.finish(plans)
    return directory


def plans_for(num_kv_heads: int) -> list[LayerPlan]:
    """Return plans that prune both branches, one, the other."""
    heads = tuple(range(1, num_kv_heads, 2))
    return [
        LayerPlan(attention=random_decision(0, heads, num_kv_heads), mlp=random_decision(1, range(5, 48), 48)),
        LayerPlan(mlp=random_decision(2, range(0, 48, 3), 48)),
        LayerPlan(attention=random_decision(3, heads[:1], num_kv_heads)),
    ]


def plans_of(directory: Path) -> list[LayerPlan]:
    """Return such plans for a model of any build."""
    shape = layer_shape(Checkpoint.open(directory).config, 0)
    first, second, third = plans_for(shape.num_attention_units)
    return [
        replace(first, mlp=random_channels(1, range(5, 48), shape)),
        replace(second, mlp=random_channels(2, range(0, 48, 3), shape)),
        third,
    ]


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids).logits


def load(directory: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


def test_the_checkpoint_computes_what_the_masked_dense_model_does(
    model_dir: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    plans = plans_of(model_dir)
    written = load(write(model_dir, tmp_path / "pruned", plans))
    expected = logits(masked_model(model_dir, plans), ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(written, ids), expected, rtol=1e-4, atol=1e-4)


def test_pruning_nothing_writes_the_same_model(model_dir: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    written = load(write(model_dir, tmp_path / "pruned", [LayerPlan()] * 3))
    dense = AutoModelForCausalLM.from_pretrained(model_dir)
    assert torch.equal(logits(written, ids), logits(dense, ids))


def test_keeping_every_unit_changes_no_weight(model_dir: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    shape = layer_shape(Checkpoint.open(model_dir).config, 0)
    units, channels = (
        Decision(tuple(range(number)), (0.0,) * number, Line(torch.ones(32), torch.zeros(32), 0.0), 0.0)
        for number in (shape.num_attention_units, shape.num_channels)
    )
    if shape.num_experts > 1:
        line = Line(torch.ones(shape.num_experts, 32), torch.zeros(32), 0.0)
        channels = replace(channels, recovery=line, with_bias=False)
    plans = [LayerPlan(attention=units if shape.num_attention_units > 1 else None, mlp=channels)] * 3
    once, dense = Checkpoint.open(write(model_dir, tmp_path / "pruned", plans)), Checkpoint.open(model_dir)
    for layer in range(3):
        tensors, before = once.read_layer(layer), dense.read_layer(layer)
        assert all(torch.equal(tensors.pop(name), tensor) for name, tensor in before.items())
        # What recovery adds to an output that had no bias.
        assert all(name.endswith("bias") and not tensor.any() for name, tensor in tensors.items())
    torch.testing.assert_close(logits(load(tmp_path / "pruned"), ids), logits(load(model_dir), ids))


def test_a_pruned_checkpoint_may_be_pruned_again(model_dir: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    first = plans_of(model_dir)
    once = write(model_dir, tmp_path / "once", first)
    shapes = [layer_shape(load(once).config, layer) for layer in range(3)]
    units = [shape.num_attention_units for shape in shapes]
    second = [
        LayerPlan(mlp=random_channels(5, range(0, shapes[0].intermediate_size, 2), shapes[0])),
        LayerPlan(attention=random_decision(6, [0], units[1]), mlp=random_channels(7, [1, 2, 9], shapes[1])),
        LayerPlan(attention=random_decision(8, [0], units[2]), mlp=random_channels(9, range(20), shapes[2])),
    ]
    twice = load(write(once, tmp_path / "twice", second))
    expected = logits(mask_again(masked_model(model_dir, first), first, second), ids)
    torch.testing.assert_close(logits(twice, ids), expected, rtol=1e-4, atol=1e-4)
    assert twice.config.intermediate_size_per_layer == [22, 3, 20]
    assert [layer_shape(twice.config, layer).num_attention_units for layer in (1, 2)] == [1, 1]


@pytest.mark.parametrize(("num_kv_heads", "heads", "kv_heads"), [(4, [2, 4, 1], [2, 4, 1]), (2, [2, 4, 2], [1, 2, 1])])
def test_the_config_has_the_numbers_of_each_layer(
    make_model: Callable[..., Path], tmp_path: Path, num_kv_heads: int, heads: list[int], kv_heads: list[int]
) -> None:
    source = make_model(num_key_value_heads=num_kv_heads)
    written = json.loads((write(source, tmp_path / "pruned", plans_for(num_kv_heads)) / "config.json").read_text())
    assert written["num_attention_heads_per_layer"] == heads
    assert written["num_key_value_heads_per_layer"] == kv_heads
    assert written["intermediate_size_per_layer"] == [43, 16, 48]
    assert written["attention_output_bias_per_layer"] == [True, False, True]
    assert written["mlp_output_bias_per_layer"] == [True, True, False]
    dense = json.loads((source / "config.json").read_text())
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "rms_norm_eps"):
        assert written[name] == dense[name]
    assert written["model_type"] == "pruned_llama"
    assert written["architectures"] == ["PrunedLlamaForCausalLM"]


def test_biases_of_the_source_are_kept_where_nothing_is_pruned(biased_model: Path, tmp_path: Path) -> None:
    written = json.loads((write(biased_model, tmp_path / "pruned", plans_for(2)) / "config.json").read_text())
    assert written["attention_output_bias_per_layer"] == written["mlp_output_bias_per_layer"] == [True] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_source(make_llama: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write(make_llama(dtype=dtype), tmp_path / "pruned", plans_for(4))
    assert {tensor.dtype for path in directory.glob("*.safetensors") for tensor in load_file(path).values()} == {dtype}
    assert load(directory).dtype == dtype


def test_the_dtype_is_named_though_the_source_does_not_name_it(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = make_llama(dtype=torch.bfloat16)
    settings = json.loads((source / "config.json").read_text())
    assert settings.pop("dtype") == "bfloat16"
    (source / "config.json").write_text(json.dumps(settings))
    written = json.loads((write(source, tmp_path / "pruned", plans_for(4)) / "config.json").read_text())
    assert written["dtype"] == "bfloat16"


@pytest.mark.parametrize("gone", [{0}, {1}, {0, 2}], ids=str)
def test_a_model_without_layers_is_the_dense_one_whose_layers_are_taken_out(
    model_dir: Path, ids: torch.Tensor, tmp_path: Path, gone: set[int]
) -> None:
    plans = [LayerPlan(dropped=layer in gone) for layer in range(3)]
    directory = write(model_dir, tmp_path / "pruned", plans)
    dense = AutoModelForCausalLM.from_pretrained(model_dir)
    layers = dense.get_submodule(Checkpoint.open(model_dir).family.layers)
    kinds = getattr(dense.config, "layer_types", None)
    for layer in sorted(gone, reverse=True):
        del layers[layer]
    if kinds is not None:
        dense.config.layer_types = [kind for layer, kind in enumerate(kinds) if layer not in gone]
    dense.config.num_hidden_layers = len(layers)
    expected = dense.eval()(ids, use_cache=False).logits
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory), ids), expected)


def test_every_list_of_a_config_with_a_value_for_each_layer_is_one_that_is_known(model_dir: Path) -> None:
    described = Checkpoint.open(model_dir).config.to_dict()
    lists = {key for key, value in described.items() if isinstance(value, list) and len(value) == 3}
    assert lists <= {*PER_LAYER_KINDS}


def test_every_layer_is_a_shard_and_the_index_names_every_tensor(mha_model: Path, tmp_path: Path) -> None:
    directory = write(mha_model, tmp_path / "pruned", plans_for(4))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    assert sorted(shards) == [f"model-{number:05d}.safetensors" for number in range(1, 7)]
    held = [{".".join(name.split(".")[:3]) for name in shards[shard]} for shard in sorted(shards)]
    layers = [{f"model.layers.{layer}"} for layer in range(3)]
    assert held == [*layers, {"lm_head.weight"}, {"model.embed_tokens.weight"}, {"model.norm.weight"}]


def test_a_layer_is_on_disk_when_it_is_committed(mha_model: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(Checkpoint.open(mha_model), tmp_path)
    writer.write_layer(0, plans_for(4)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001.safetensors"]


def test_the_tokenizer_and_the_license_come_along_and_other_weights_do_not(mha_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(mha_model, tmp_path / "source")
    copied = {
        "tokenizer.json": "{}",
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "LICENSE.txt": "free",
        "generation_config.json": "{}",
    }
    for name, content in (copied | {"pytorch_model.bin": "old", "README.md": "of the dense model"}).items():
        (source / name).write_text(content)
    directory = write(source, tmp_path / "pruned", plans_for(4))
    assert {name: (directory / name).read_text() for name in copied} == copied
    assert not (directory / "pytorch_model.bin").exists()
    assert not (directory / "README.md").exists()
    # This tokenizer does not load, so nothing is known about its class.
    assert not (directory / "tokenizer_config.json").exists()


def test_a_tokenizers_own_class_stays(mha_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(mha_model, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "model_max_length": 7}')
    directory = write(source, tmp_path / "pruned", plans_for(4))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "LlamaTokenizer", "model_max_length": 7}


def test_the_checkpoint_loads_where_this_package_is_not(
    gqa_model: Path, tmp_path: Path, ids: torch.Tensor, elsewhere: Elsewhere
) -> None:
    plans = plans_for(2)
    found = elsewhere.logits(write(gqa_model, tmp_path / "pruned", plans), ids)
    torch.testing.assert_close(found, logits(masked_model(gqa_model, plans), ids), rtol=1e-4, atol=1e-4)


def test_a_broken_tokenizer_config_is_known_before_anything_is_written(mha_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(mha_model, tmp_path / "model")
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is not valid JSON"):
        CheckpointWriter(Checkpoint.open(source), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_a_weight_beyond_the_dtype_is_named_by_its_layer(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    writer = CheckpointWriter(Checkpoint.open(make_llama(dtype=torch.float16)), tmp_path / "pruned")
    decision = random_decision(1, range(5, 48), 48)
    assert isinstance(decision.recovery, Line)
    beyond = replace(decision, recovery=replace(decision.recovery, scale_D=decision.recovery.scale_D * 1e9))
    with pytest.raises(NonFiniteError, match=r"^layer 2: .*down_proj"):
        writer.write_layer(2, LayerPlan(mlp=beyond))
    assert not list((tmp_path / "pruned").iterdir())
