"""Checkpoints are read as safetensors reads them, and every kind of broken one gives an error."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tensor_index import INDEX, SINGLE
from slimllm_ops.errors import CheckpointError, NonFiniteError
from slimllm_ops.stream.passes import LayerStream

SHARDED = {"max_shard_size": "20KB"}


@pytest.fixture(scope="module", params=["single", "sharded"])
def model_dir(request: pytest.FixtureRequest, make_llama: Callable[..., Path]) -> Path:
    return make_llama(**(SHARDED if request.param == "sharded" else {}))


@pytest.fixture
def copy(mha_model: Path, tmp_path: Path) -> Path:
    """A checkpoint of one file that a test may break."""
    return shutil.copytree(mha_model, tmp_path / "copy")


@pytest.fixture
def sharded_copy(make_llama: Callable[..., Path]) -> Path:
    """A checkpoint of several files that a test may break."""
    return make_llama(**SHARDED)


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def change(directory: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of a checkpoint of one file; None takes one out."""
    tensors = load_file(directory / SINGLE) | changed
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / SINGLE, metadata={"format": "pt"})


def pass_through(directory: Path) -> None:
    """Read everything, as a run does."""
    stream = LayerStream(Checkpoint.open(directory), [torch.zeros(1, 4, dtype=torch.int64)], torch.device("cpu"))
    for layer in range(stream.checkpoint.num_layers):
        stream.forward(layer)
    stream.negative_log_likelihood()


# Reading.


def test_the_sharded_checkpoint_has_several_shards(sharded_copy: Path) -> None:
    assert len(set(Checkpoint.open(sharded_copy).files.values())) > 3


def test_layers_and_the_rest_are_what_safetensors_reads(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(model_dir)
    read = {
        f"{checkpoint.layer_prefix(layer)}{name}": tensor
        for layer in range(checkpoint.num_layers)
        for name, tensor in checkpoint.read_layer(layer).items()
    }
    for module in checkpoint.outside():
        read |= {f"{module}.{name}": tensor for name, tensor in checkpoint.read_module(module).items()}
    expected = load_all(model_dir)
    assert set(read) == set(expected)
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_layer_1_is_not_layer_10(make_llama: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(make_llama(num_hidden_layers=11))
    assert len(checkpoint.layer_names(1)) == len(checkpoint.layer_names(10)) == 9
    assert set(checkpoint.read_layer(1)) == set(checkpoint.read_layer(10))


def test_shapes_and_counts_are_those_of_the_tensors(model_dir: Path) -> None:
    checkpoint, tensors = Checkpoint.open(model_dir), load_all(model_dir)
    names = checkpoint.layer_names(1)
    assert checkpoint.shapes(names) == {name: tuple(tensors[name].shape) for name in names}
    assert checkpoint.num_parameters(list(tensors)) == sum(tensor.numel() for tensor in tensors.values())
    assert checkpoint.num_bytes() == sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    assert checkpoint.has(1, "mlp.down_proj.weight")
    assert not checkpoint.has(1, "mlp.down_proj.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_keep_the_dtype_that_they_are_stored_in(make_llama: Callable[..., Path], dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(make_llama(dtype=dtype))
    assert checkpoint.dtype == dtype
    assert {tensor.dtype for tensor in checkpoint.read_layer(0).values()} == {dtype}
    names = checkpoint.layer_names(0)
    assert checkpoint.dtypes(names) == dict.fromkeys(names, {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype])


def test_a_digest_is_of_the_weights(copy: Path, mha_model: Path) -> None:
    before = Checkpoint.open(mha_model).digest()
    (copy / "README.md").write_text("not a weight")
    assert Checkpoint.open(copy).digest() == before
    name = "model.layers.2.mlp.up_proj.weight"
    weight = load_file(copy / SINGLE)[name]
    weight[3, 4] += 1e-3
    change(copy, {name: weight})
    assert Checkpoint.open(copy).digest() != before


def test_a_digest_covers_every_shard(sharded_copy: Path) -> None:
    before = Checkpoint.open(sharded_copy).digest()
    last = max(sharded_copy.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(last).items()}, last)
    assert Checkpoint.open(sharded_copy).digest() != before


# What can be broken.


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_directory_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(copy)


def test_a_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        Checkpoint.open(copy)


def test_a_config_that_is_no_object(copy: Path) -> None:
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list, expected a JSON object"):
        Checkpoint.open(copy)


def test_an_architecture_that_transformers_does_not_know(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "perceptron-9000"}))
    with pytest.raises(CheckpointError, match=r"'perceptron-9000' are not supported; supported: .*llama"):
        Checkpoint.open(copy)


def test_an_architecture_that_has_no_row(copy: Path) -> None:
    GPT2Config().save_pretrained(copy)
    with pytest.raises(CheckpointError, match=r"'gpt2' are not supported: their linear maps are stored"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_truncated_file(copy: Path, sharded_copy: Path, sharded: bool) -> None:
    path = max((sharded_copy if sharded else copy).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"shard {path.name} .* is truncated or broken"):
        Checkpoint.open(path.parent)


def test_a_missing_shard(sharded_copy: Path) -> None:
    path = max(sharded_copy.glob("*.safetensors"))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"shard {path.name} .* is missing"):
        Checkpoint.open(sharded_copy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("{}", "is truncated or broken .it has no weight_map.: download it again"),
        ('{"weight_map": ["a"]}', "is truncated or broken"),
        ('{"weight_map": {"a": 1}}', "says that a is in 1, which is not the name of a safetensors file"),
        ("[" * 10**5, "is nested too deeply"),
    ],
)
def test_a_broken_index(sharded_copy: Path, content: str, said: str) -> None:
    (sharded_copy / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX} {said}"):
        Checkpoint.open(sharded_copy)


@pytest.mark.parametrize(
    "file_name",
    ["../other/model.safetensors", "/etc/passwd", "..", "a/model.safetensors", "pytorch_model.bin", "x\0.safetensors"],
)
def test_an_index_names_nothing_but_safetensors_beside_it(copy: Path, tmp_path: Path, file_name: str) -> None:
    (tmp_path / "other").mkdir()
    shutil.copyfile(copy / SINGLE, tmp_path / "other" / SINGLE)
    names = dict.fromkeys(load_file(copy / SINGLE), file_name)
    (copy / SINGLE).unlink()
    (copy / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        CheckpointError, match=r"not the name of a safetensors file in the same directory: download it again"
    ):
        Checkpoint.open(copy)


def test_links_are_followed(mha_model: Path, tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    for path in mha_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert Checkpoint.open(tmp_path).digest() == Checkpoint.open(mha_model).digest()


def test_a_tensor_that_the_index_names_and_no_shard_holds(sharded_copy: Path) -> None:
    path = max(sharded_copy.glob("*.safetensors"))
    tensors = load_file(path)
    name = min(tensors)
    del tensors[name]
    save_file(tensors | {"other": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=f"has no {name}: the checkpoint is incomplete"):
        Checkpoint.open(sharded_copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_only(copy: Path, name: str) -> None:
    (copy / SINGLE).rename(copy / name)
    with pytest.raises(CheckpointError, match=f"only the pickle {name}: convert it to safetensors"):
        Checkpoint.open(copy)


def with_header(path: Path, header: bytes, length: int | None = None) -> None:
    """Give a file of weights another header, and the length of one that may be another still."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data[start:])


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


NORM = "model.norm.weight"
HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda header: [],
    "overlapping": lambda header: header | {NORM: header["model.layers.0.input_layernorm.weight"]},
    "beyond the file": lambda header: header | {NORM: header[NORM] | {"data_offsets": [0, 10**12]}},
    "backwards": lambda header: header | {NORM: header[NORM] | {"data_offsets": header[NORM]["data_offsets"][::-1]}},
    "huge": lambda header: header | {NORM: header[NORM] | {"shape": [10**12]}},
    "overflowing": lambda header: header | {NORM: header[NORM] | {"shape": [2**32, 2**32]}},
    "negative": lambda header: header | {NORM: header[NORM] | {"shape": [-32]}},
    "no dtype": lambda header: header | {NORM: header[NORM] | {"dtype": "F33"}},
}


@pytest.mark.parametrize("broken", HEADERS)
def test_a_header_that_lies(copy: Path, broken: str) -> None:
    path = copy / SINGLE
    with_header(path, json.dumps(HEADERS[broken](header_of(path))).encode())
    with pytest.raises(CheckpointError, match=rf"shard {SINGLE} .* is truncated or broken"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("length", [10**12, 2**64 - 1, 0, 7])
def test_a_header_of_another_length(copy: Path, length: int) -> None:
    path = copy / SINGLE
    with_header(path, json.dumps(header_of(path)).encode(), length)
    with pytest.raises(CheckpointError, match=rf"shard {SINGLE} .* is truncated or broken"):
        Checkpoint.open(copy)


def test_a_name_that_is_there_twice(copy: Path) -> None:
    path = copy / SINGLE
    header = json.dumps(header_of(path))
    with_header(path, (header[:-1] + f', "{NORM}": ' + json.dumps(header_of(path)["lm_head.weight"]) + "}").encode())
    with pytest.raises(CheckpointError, match=rf"shard {SINGLE} .* is truncated or broken"):
        Checkpoint.open(copy)


def test_a_shard_that_is_no_file(copy: Path) -> None:
    (copy / SINGLE).unlink()
    os.mkfifo(copy / "a.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": {NORM: "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"shard a\.safetensors of .* is not a file"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_no_plain_numbers(copy: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(copy, {name: load_file(copy / SINGLE)[name].to(dtype)})
    with pytest.raises(CheckpointError, match=r"layer 1 of .* holds mlp\.up_proj\.weight as .*: pass the model in bf"):
        Checkpoint.open(copy)


def test_tensors_that_the_model_has_no_place_for(copy: Path) -> None:
    change(copy, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.7.x": torch.ones(1)})
    pass_through(copy)
    for name in ("v_head.summary.weight", "loose"):
        change(copy, {name: torch.ones(3)})
        pass_through(copy)
        assert f"stores {min(name, 'model.layers.7.x')} and 1 more" in Checkpoint.open(copy).warnings[0]
        change(copy, {name: None})


def test_no_weights_at_all(copy: Path) -> None:
    (copy / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        Checkpoint.open(copy)


def test_fewer_layers_than_the_config_names(copy: Path) -> None:
    names = [name for name in load_file(copy / SINGLE) if name.startswith("model.layers.2.")]
    change(copy, dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=r"has no tensors of layer 2, though its config\.json names 3 layers"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_with_its_layer(copy: Path, value: float) -> None:
    name = "mlp.gate_proj.weight"
    weight = load_file(copy / SINGLE)[f"model.layers.1.{name}"]
    weight[5, 6] = value
    change(copy, {f"model.layers.1.{name}": weight})
    checkpoint = Checkpoint.open(copy)
    checkpoint.read_layer(0)
    with pytest.raises(NonFiniteError, match=rf"layer 1 .* holds NaN or infinity in {name}"):
        checkpoint.read_layer(1)


def test_an_embedding_that_is_no_number_is_named(copy: Path) -> None:
    name = "model.embed_tokens.weight"
    change(copy, {name: load_file(copy / SINGLE)[name] * float("nan")})
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens .* holds NaN or infinity in weight"):
        Checkpoint.open(copy).read_module("model.embed_tokens")


@pytest.mark.parametrize(
    ("missing", "described"),
    [
        ("model.layers.1.self_attn.o_proj.weight", r"layer 1 .* has no self_attn\.o_proj\.weight"),
        ("model.layers.0.mlp.up_proj.weight", r"layer 0 .* has no mlp\.up_proj\.weight"),
        ("model.layers.2.input_layernorm.weight", r"layer 2 .* has no input_layernorm\.weight"),
        ("model.embed_tokens.weight", r"has no model\.embed_tokens\.weight"),
        ("model.norm.weight", r"has no model\.norm\.weight"),
        ("lm_head.weight", r"has no lm_head\.weight"),
    ],
)
def test_a_missing_tensor_is_named_before_it_is_computed_with(copy: Path, missing: str, described: str) -> None:
    pass_through(copy)
    change(copy, {missing: None})
    with pytest.raises(CheckpointError, match=f"{described}: the checkpoint is incomplete"):
        pass_through(copy)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            (47, 32),
            r"layer 1 of .*: mlp\.up_proj\.weight is \(47, 32\), expected \(48",
        ),
        ("model.layers.2.self_attn.o_proj.weight", (0, 32), r"layer 2 of .*: self_attn\.o_proj\.weight is \(0, 32\)"),
        ("model.layers.0.input_layernorm.weight", (32, 1), r"layer 0 of .*: input_layernorm\.weight is \(32, 1\)"),
        ("model.embed_tokens.weight", (96, 32), r": model\.embed_tokens\.weight is \(96, 32\), expected \(97, 32\)"),
        ("lm_head.weight", (), r": lm_head\.weight is \(\), expected \(97, 32\)"),
    ],
)
def test_a_tensor_that_does_not_fit_the_config(copy: Path, name: str, shape: tuple[int, ...], said: str) -> None:
    change(copy, {name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json" + said if said[0] == ":" else said):
        Checkpoint.open(copy)
