"""Decides which tensors of a directory make up the model: the same as transformers' `from_pretrained` loads.

Transformers prefers one whole file to shards. It adds or removes the prefix of the base model, ignores tensors that the
model has no place for, and ties the head to the embeddings only if the two do not differ.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slimllm_ops.checkpoint.tensor_index import INDEX, SINGLE, Place, TensorIndex, open_shard
from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.files import read_json_object
from slimllm_ops.models.families import Family

# Processes that only read weights import this module too, and importing transformers takes seconds.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "lm_head"
# The largest index file that is read, in bytes.
LARGEST_INDEX = 1 << 26
# The rows of two tensors that are compared at a time.
COMPARED_ROWS = 1 << 12
# Tables that old checkpoints store and transformers computes.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def weight_files(directory: Path) -> list[str]:
    """Return the names of the files that transformers loads, in its order.

    Raises:
        CheckpointError: There is none, or the index is broken.
    """
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds an adapter (adapter_config.json), not a whole model: merge it into its model with "
            f"peft's merge_and_unload(), and pass that"
        )
    if (directory / SINGLE).is_file():
        return [SINGLE]
    if (directory / INDEX).is_file():
        return sorted(set(_read_weight_map(directory / INDEX).values()))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt*") for path in directory.glob(pattern))
    found = f"only the pickle {pickles[0]}: convert it to safetensors" if pickles else "no weights"
    raise CheckpointError(f"{directory} holds {found}; expected {SINGLE} or {INDEX}")


def locate_tensors(directory: Path, family: Family) -> dict[str, Place]:
    """Open every weight file, and return the place of each tensor by its name in the model's class.

    Raises:
        CheckpointError: A file is missing or broken, there is none, or two tensors have the same name in the class.
    """
    stored: dict[str, str] = {}
    for file_name in weight_files(directory):
        with open_shard(directory / file_name) as file:
            stored.update(dict.fromkeys(file.keys(), file_name))
    places: dict[str, Place] = {}
    for stored_name, file_name in stored.items():
        name = name_in_class(stored_name, family)
        if name in places:
            raise CheckpointError(
                f"{directory} stores {shown(name)} twice, as {shown(places[name].name)} and as {shown(stored_name)}: "
                f"save it again with transformers' save_pretrained"
            )
        places[name] = Place(file_name, stored_name)
    return places


def name_in_class(stored: str, family: Family) -> str:
    """Return a stored tensor's name in the class of the whole model.

    Checkpoints of the base model lack its prefix (`layers.0...` for `model.layers.0...`), and others have it before the
    head too.
    """
    base = family.layers.partition(".")[0]
    for module, called in family.stored_as:
        if stored.startswith(f"{called}."):
            stored = f"{module}.{stored.removeprefix(f'{called}.')}"
    inner = stored.removeprefix(f"{base}.")
    return inner if inner.startswith(f"{HEAD}.") else f"{base}.{inner}"


def used_places(index: TensorIndex, model: "PreTrainedModel") -> dict[str, Place]:
    """Return the places of the tensors that the model, built from the config, has a place for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = {part for name, shape in shapes.items() for part, _ in index.stored_parts(name, shape)}
    return {name: place for name, place in index.files.items() if name in parts}


def tell_of_files(directory: Path) -> Iterator[str]:
    """Yield a warning if a directory holds the weights twice."""
    if (directory / SINGLE).is_file() and (directory / INDEX).is_file():
        yield f"{directory} holds {SINGLE} and {INDEX}: transformers loads {SINGLE}, and so does slimllm"


def tell_of_unused(index: TensorIndex, used: dict[str, Place], model: "PreTrainedModel") -> Iterator[str]:
    """Yield a warning if the model has no place for some tensors, unless transformers expects those."""
    expected = [*COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    names = sorted(place.name for name, place in index.files.items() if name not in used)
    unused = [name for name in names if not any(re.search(pattern, name) for pattern in expected)]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        yield (
            f"{index.directory} stores {shown(unused[0])}{more}, which a {index.config.model_type} model with this "
            f"config.json does not have: transformers ignores such tensors, and so does slimllm"
        )


def tie_as_stored(index: TensorIndex, tied: dict[str, str]) -> list[str]:
    """Tie weights where their values allow it, in the index and its config; return warnings where they do not.

    A config may tie the head to the embeddings, and the files store both. If they are equal, one is forgotten. If they
    differ, the model has two. If only the head is stored, it is the embedding.

    Args:
        index: The checkpoint; this changes its places and its config.
        tied: The names of the tied weights, and of those that they are tied to.
    """
    untied = []
    for target, source in tied.items():
        if target not in index.files:
            continue
        if source not in index.files:
            index.files[source] = index.files.pop(target)
        elif _are_equal(index, target, source):
            del index.files[target]
        else:
            index.config.tie_word_embeddings = False
            untied.append(
                f"{index.directory}: config.json ties {target} to {source}, but the stored values differ: like "
                f"transformers, slimllm does not tie them, and the pruned model's config.json says so"
            )
    return untied


def _are_equal(index: TensorIndex, one: str, other: str) -> bool:
    """Compare two stored tensors, some rows at a time, in the dtype that transformers loads them in."""
    places, dtype = (index.files[one], index.files[other]), index.config.dtype or torch.float32
    with open_shard(index.directory / places[0].file) as first, open_shard(index.directory / places[1].file) as second:
        slices = first.get_slice(places[0].name), second.get_slice(places[1].name)
        shapes = [stored.get_shape() for stored in slices]
        return shapes[0] == shapes[1] and all(
            torch.equal(*(stored[start : start + COMPARED_ROWS].to(dtype) for stored in slices))
            for start in range(0, shapes[0][0], COMPARED_ROWS)
        )


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return the file that an index expects each tensor in; every file is in the index's own directory."""
    weight_map = read_json_object(path, LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is truncated or broken (it has no weight_map): download it again")
    for name, file_name in weight_map.items():
        # A name of this form cannot be a path: it has no separator of any system and is not "..". Nor is it a pickle.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w-][\w .-]*\.safetensors", file_name):
            raise CheckpointError(
                f"{path} says that {shown(name)} is in {shown(repr(file_name))}, which is not the name of a "
                f"safetensors file in the same directory: download it again"
            )
    return weight_map
