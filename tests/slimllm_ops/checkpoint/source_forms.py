"""The forms that a model directory may have: names, files, tied weights and dtypes, as changes of a saved model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.tensor_index import INDEX, SINGLE
from slimllm_ops.models.families import FAMILIES, Family

Tensors = dict[str, Tensor]
Change = Callable[[Family, Path], None]
BASES = {family.model_type: family.layers.partition(".")[0] for family in FAMILIES}


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a directory with one file."""
    tensors = change(load_file(directory / SINGLE))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / SINGLE, {"format": "pt"})


def embedding_of(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith(("embed_tokens.weight", "embed_in.weight")))


def head_of(tensors: Tensors) -> str:
    return next(name for name in tensors if name in ("lm_head.weight", "embed_out.weight"))


def as_saved(family: Family, directory: Path) -> None:
    pass


def sharded(family: Family, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / SINGLE).unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert (directory / INDEX).is_file()


def old_shards_and_a_newer_file(family: Family, directory: Path) -> None:
    newer = load_file(directory / SINGLE)
    sharded(family, directory)
    save_file({name: tensor + 1 for name, tensor in newer.items()}, directory / SINGLE, {"format": "pt"})


def an_index_that_is_out_of_date(family: Family, directory: Path) -> None:
    sharded(family, directory)
    index = json.loads((directory / INDEX).read_text())
    names = list(index["weight_map"])
    # It names a tensor that no file holds, not all of those that they do, and one in another file than it is in.
    index["weight_map"] |= {"gone": index["weight_map"].pop(names[0]), names[1]: index["weight_map"][names[-1]]}
    (directory / INDEX).write_text(json.dumps(index))


def names_of_the_base_model(family: Family, directory: Path) -> None:
    base = f"{BASES[family.model_type]}."
    rewrite(directory, lambda tensors: {name.removeprefix(base): tensor for name, tensor in tensors.items()})


def a_head_below_the_base_model(family: Family, directory: Path) -> None:
    base = BASES[family.model_type]

    def change(tensors: Tensors) -> Tensors:
        tensors[f"{base}.lm_head.weight"] = tensors.pop(head_of(tensors))
        return tensors

    rewrite(directory, change)


def tensors_without_a_place(family: Family, directory: Path) -> None:
    layers = family.layers
    others = [f"{layers}.0.self_attn.rotary_emb.inv_freq", f"{layers}.3.input_layernorm.weight", "score.weight"]
    others += [f"{layers}.1.{name}.bias" for name in (*family.attention.inputs, family.mlp.output)]
    rewrite(directory, lambda tensors: dict.fromkeys(others, torch.ones(3)) | tensors)


def the_head_is_a_copy(family: Family, directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": tensors[embedding_of(tensors)]})


def the_head_is_another(family: Family, directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": tensors[embedding_of(tensors)] + 1})


def only_the_head_is_there(family: Family, directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": tensors.pop(embedding_of(tensors))})


def in_dtype(dtype: torch.dtype) -> Change:
    def change(family: Family, directory: Path) -> None:
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).save_pretrained(directory)

    change.__name__ = str(dtype)
    return change
