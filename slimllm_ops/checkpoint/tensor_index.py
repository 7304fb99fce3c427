"""Holds which tensors a model directory has, in which files and under which names.

Files may use other tensor names than the model's class, or store a tensor in parts (`models/tensor_layout.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.files import NotPlainError, require_plain
from slimllm_ops.models.families import Family
from slimllm_ops.models.quantisation import Blocks
from slimllm_ops.models.tensor_layout import Stored

# A solve reads weights but no config, so it need not import transformers, which takes seconds.
if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Scale(NamedTuple):
    """The place of a float8 weight's scale, the blocks that it scales, and the dtype that the weight is restored to."""

    place: "Place"
    blocks: Blocks
    dtype: torch.dtype


class Place(NamedTuple):
    """The file that holds a tensor, the tensor's name in that file, and its scale if it is stored as float8."""

    file: str
    name: str
    scale: Scale | None = None


@dataclass(frozen=True)
class TensorIndex:
    """The tensors of a model directory.

    Attributes:
        directory: The directory.
        config: The model's config.
        family: The model's family.
        files: The place of each tensor, by its name in the model's class, or by that of its part.
        warnings: What the user should know about the weights.
    """

    directory: Path
    config: "PretrainedConfig"
    family: Family
    files: dict[str, Place]
    warnings: tuple[str, ...] = field(default=(), kw_only=True)

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
        return sorted({name.rpartition(".")[0] for name in names})

    def stored_parts(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each stored part of a tensor of the model, from its full name and shape."""
        prefix, _, key = name.removeprefix(f"{self.family.layers}.").partition(".")
        split = self.split_of(key)
        if split is None or name in self.files:
            yield name, shape
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


@contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """Open one of a checkpoint's safetensors files for the duration of the context.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    try:
        require_plain(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except NotPlainError as error:
        raise CheckpointError(
            f"shard {path.name} of {path.parent} is not a file ({error.strerror}): download it again"
        ) from error
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
