"""Finds which tensors a model directory holds, in which files and under which names.

Files may use other tensor names than the model's class, or store a tensor in parts (`models/tensor_layout.py`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.files import read_json_object
from slimllm_ops.models.families import Family
from slimllm_ops.models.tensor_layout import Stored

# A solve reads weights but no config, so it need not import transformers, which takes seconds.
if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The largest index file that is read, in bytes.
LARGEST_INDEX = 1 << 28


@dataclass(frozen=True)
class TensorIndex:
    """The tensors of a model directory: its config, its family, and which file holds which tensor."""

    directory: Path
    config: "PretrainedConfig"
    family: Family
    files: dict[str, str]

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.config.num_hidden_layers

    def layer_prefix(self, layer: int) -> str:
        """Return the prefix of the names of a layer's tensors."""
        return f"{self.family.layers}.{layer}."

    def layer_names(self, layer: int) -> list[str]:
        """Return the full names of a layer's tensors."""
        return [name for name in self.files if name.startswith(self.layer_prefix(layer))]

    def has(self, layer: int, name: str) -> bool:
        """Return whether a layer has a tensor with that name, relative to the layer."""
        return self.layer_prefix(layer) + name in self.files

    def outside(self) -> list[str]:
        """Return the modules that hold the tensors outside the decoder layers: embeddings, final norm, head."""
        names = [name for name in self.files if not name.startswith(f"{self.family.layers}.")]
        called = {stored: module for module, stored in self.family.stored_as}
        stored = {name.rpartition(".")[0] for name in names}
        return sorted(called.get(module, module) for module in stored)

    def stored_name(self, name: str) -> str:
        """Return the name in the files of a tensor of the model, from its full name in the model's class."""
        for module, stored in self.family.stored_as:
            renamed = f"{stored}.{name.removeprefix(f'{module}.')}"
            if name.startswith(f"{module}.") and any(one.startswith(f"{stored}.") for one in self.files):
                return renamed
        return name

    def stored_parts(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each stored part of a tensor of the model, from its full name and shape."""
        prefix, _, key = name.removeprefix(f"{self.family.layers}.").partition(".")
        split = self.split_of(key)
        if split is None or name in self.files:
            yield self.stored_name(name), shape
            return
        for part in split.names(self.family.num_experts(self.config)):
            yield f"{self.family.layers}.{prefix}.{part}", split.part_shape(shape)

    def split_of(self, name: str) -> Stored | None:
        """Return the layout of a layer's tensor that files may store in parts, by its name in the layer, or None."""
        return next((one for one in self.family.stored if one.name == name), None)

    def place_of(self, name: str) -> tuple[str, str]:
        """Return a description of the layer and directory that hold a tensor, and the tensor's name there."""
        prefix = f"{self.family.layers}."
        if not name.startswith(prefix):
            return str(self.directory), name
        layer, _, key = name.removeprefix(prefix).partition(".")
        return f"layer {layer} of {self.directory}", key


def locate_tensors(directory: Path) -> dict[str, str]:
    """Open every weight file and return which file holds which tensor.

    Raises:
        CheckpointError: A file is missing or broken, there is none, or the index names a tensor that no file holds.
    """
    if (directory / INDEX).is_file():
        expected: dict[str, str] = _read_weight_map(directory / INDEX)
        file_names = sorted(set(expected.values()))
    elif (directory / SINGLE).is_file():
        expected, file_names = {}, [SINGLE]
    else:
        pickles = sorted(path.name for path in directory.glob("*.bin")) + sorted(
            path.name for path in directory.glob("*.pt*")
        )
        found = f"only the pickle {pickles[0]}: convert it to safetensors" if pickles else "no weights"
        raise CheckpointError(f"{directory} holds {found}; expected {SINGLE} or {INDEX}")
    located: dict[str, str] = {}
    for file_name in file_names:
        with open_shard(directory / file_name) as file:
            located.update(dict.fromkeys(file.keys(), file_name))
    missing = sorted(set(expected) - set(located))
    if missing:
        raise CheckpointError(
            f"{directory}: {INDEX} names {shown(missing[0])}, which no shard holds: download it again"
        )
    return located


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


@contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """Open one of a checkpoint's safetensors files for the duration of the context.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    try:
        # Opening a pipe would block.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"shard {path.name} of {path.parent} is not a file: download it again")
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"shard {path.name} of {path.parent} is missing: download it again") from error
    except OSError as error:
        raise CheckpointError(
            f"shard {path.name} of {path.parent} cannot be read ({error}): make it readable"
        ) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"shard {path.name} of {path.parent} is truncated or broken ({shown(str(error), 200)}): download it again"
        ) from error
