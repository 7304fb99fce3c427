"""Reading a Hugging Face checkpoint a layer at a time: no process ever holds the whole model."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimllm_ops.checkpoint.tensor_index import TensorIndex, locate_tensors, open_shard
from slimllm_ops.checkpoint.validation import require_fit, require_layers
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.config_checks import read_config
from slimllm_ops.models.families import family_of
from slimllm_ops.models.tensor_layout import Stored


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a layer, and the files that hold it. It pickles small, and reading it needs no transformers.

    Attributes:
        directory: The checkpoint's.
        files: The file of each tensor that makes up the weight, by the tensor's full name.
        prefix: What the tensors' names begin with.
        split: How the tensors merge into the weight; None where one tensor is the weight.
        num_experts: How many experts the tensors are of.
    """

    directory: Path
    files: dict[str, str]
    prefix: str
    split: Stored | None
    num_experts: int

    def read(self) -> Tensor:
        """Return the weight as stored."""
        tensors = {name.removeprefix(self.prefix): tensor for name, tensor in self.read_parts().items()}
        return tensors.popitem()[1] if self.split is None else self.split.merge(tensors, self.num_experts)

    def read_parts(self) -> dict[str, Tensor]:
        """Return the tensors that make up the weight, by their full names."""
        return read_tensors(self.directory, self.files)


@dataclass(frozen=True)
class Checkpoint(TensorIndex):
    """A model directory that was found whole, and whose tensors can be read."""

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Check a model directory and return it.

        Raises:
            CheckpointError: the directory, its config or a shard is missing or broken, the weights are not
                in safetensors or do not fit the config, or the architecture is unknown.
        """
        directory = Path(directory)
        config = read_config(directory)
        checkpoint = cls(directory, config, family_of(config), locate_tensors(directory))
        # What the config describes is built only where every one of its layers is there.
        require_layers(checkpoint)
        require_fit(checkpoint)
        return checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the first layer's weights are stored in."""
        first = next(iter(self.stored_weight(0, self.family.mlp.output_weight).files))
        return self.read([first])[first].dtype

    def read_module(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a module outside the decoder layers as stored, by their names in it.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        stored = self.stored_name(f"{module}.").removesuffix(".")
        tensors = self.read([name for name in self.files if name.rpartition(".")[0] == stored])
        return self._require_finite(tensors, f"{stored}.", module)

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Return one layer's tensors as stored, by what the model's class calls them, relative to the layer.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        prefix = self.layer_prefix(layer)
        held = self._require_finite(self.read(self.layer_names(layer)), prefix, f"layer {layer}")
        return self._merged(held)

    def read_weight(self, layer: int, name: str) -> Tensor:
        """Return one of a layer's tensors as stored, by what the model's class calls it, relative to the layer."""
        return self.stored_weight(layer, name).read()

    def stored_weight(self, layer: int, name: str) -> StoredWeight:
        """Return where one of a layer's tensors lies, by what the model's class calls it, relative to the layer."""
        prefix, num_experts = self.layer_prefix(layer), self.family.num_experts(self.config)
        split = None if self.has(layer, name) else self.split_of(name)
        parts = [name] if split is None else split.names(num_experts)
        files = {prefix + part: self.files[prefix + part] for part in parts}
        return StoredWeight(self.directory, files, prefix, split, num_experts)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors by their full names, as stored; files are open_shard only for as long as it takes."""
        return read_tensors(self.directory, {name: self.files[name] for name in names})

    def num_parameters(self, names: list[str]) -> int:
        """Return how many scalars tensors hold, without reading them."""
        return sum(math.prod(shape) for shape in self.shapes(names).values())

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one layer's tensors, by what the model's class calls them, without reading them."""
        prefix, num_experts = self.layer_prefix(layer), self.family.num_experts(self.config)
        shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes(self.layer_names(layer)).items()}
        for stored in self.family.stored:
            first = next(stored.names(num_experts))
            if first in shapes:
                shapes[stored.name] = stored.whole_shape(shapes[first], num_experts)
                for name in stored.names(num_experts):
                    del shapes[name]
        return shapes

    def shapes(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors by their full names, without reading them."""
        return {name: tuple(stored.get_shape()) for name, stored in self._slices(names)}

    def dtypes(self, names: list[str]) -> dict[str, str]:
        """Return what tensors are stored in, one of DTYPES, by their full names, without reading them."""
        return {name: stored.get_dtype() for name, stored in self._slices(names)}

    def num_bytes(self) -> int:
        """Return the size of the weights' files."""
        return sum((self.directory / name).stat().st_size for name in set(self.files.values()))

    def digest(self) -> str:
        """Return the SHA-256 of the weights' files, in the order of their names."""
        sha = hashlib.sha256()
        for file_name in sorted(set(self.files.values())):
            with (self.directory / file_name).open("rb") as file:
                while chunk := file.read(1 << 24):
                    sha.update(chunk)
        return sha.hexdigest()

    def _slices(self, names: list[str]) -> Iterator[tuple[str, Any]]:
        """Yield tensors by their full names, of which a header alone is read; each is good until the next."""
        for file_name in sorted({self.files[name] for name in names}):
            with open_shard(self.directory / file_name) as file:
                for name in [name for name in names if self.files[name] == file_name]:
                    yield name, file.get_slice(name)

    def _require_finite(self, tensors: dict[str, Tensor], prefix: str, described: str) -> dict[str, Tensor]:
        """Return tensors by their names after a prefix."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{described} of {self.directory} holds NaN or infinity in {name.removeprefix(prefix)}: "
                    f"the checkpoint is damaged; take it from its source again"
                )
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _merged(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of a layer by what the class calls them; those that are held in parts are put together."""
        num_experts = self.family.num_experts(self.config)
        for stored in self.family.stored:
            if next(stored.names(num_experts)) in held:
                held[stored.name] = stored.merge(held, num_experts)
        return held


def read_tensors(directory: Path, files: dict[str, str]) -> dict[str, Tensor]:
    """Return tensors as stored, from a map of their names to files in a directory.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    tensors = {}
    for file_name in sorted(set(files.values())):
        with open_shard(directory / file_name) as file:
            for name in files:
                if files[name] == file_name:
                    # A copy, so that the mapped file's pages do not stay in this process's memory.
                    tensors[name] = file.get_tensor(name).clone()
    return tensors
