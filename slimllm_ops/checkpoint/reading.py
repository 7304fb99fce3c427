"""Reads a Hugging Face checkpoint one layer at a time: no process ever holds the whole model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimllm_ops.checkpoint.float8 import restore, tell_of_float8, with_scales
from slimllm_ops.checkpoint.resolution import (
    locate_tensors,
    tell_of_files,
    tell_of_unused,
    tie_as_stored,
    used_places,
)
from slimllm_ops.checkpoint.tensor_index import Place, TensorIndex, open_shard
from slimllm_ops.checkpoint.validation import model_of, require_fit, require_layers
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.files import digest_files
from slimllm_ops.models.config_checks import read_config
from slimllm_ops.models.families import family_of
from slimllm_ops.models.tensor_layout import Stored


@dataclass(frozen=True)
class StoredWeight:
    """A reference to one weight of a layer and its files. It pickles small, and reading it needs no transformers.

    Attributes:
        directory: The checkpoint's directory.
        files: The place of each tensor that makes up the weight, by the tensor's full name.
        prefix: The prefix of the tensors' names.
        split: The layout that merges the tensors into the weight; None if a single tensor is the weight.
        num_experts: The number of experts that the tensors belong to.
    """

    directory: Path
    files: dict[str, Place]
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
    """A model directory that passed all checks, and whose tensors can be read."""

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Check a model directory and return it.

        Raises:
            CheckpointError: The directory, its config or a shard is missing or broken, the weights are not
                in safetensors format or do not fit the config, or the architecture is unknown.
        """
        directory = Path(directory)
        config, blocks = read_config(directory)
        family = family_of(config)
        places = locate_tensors(directory, family)
        if blocks is not None:
            places = with_scales(directory, places, blocks, config.dtype, family.layers)
        found = cls(directory, config, family, places)
        # First check that all layers exist, and then build the model that the config describes.
        require_layers(found)
        model = model_of(directory, config)
        used = used_places(found, model)
        checkpoint = cls(directory, config, family, used)
        warnings = [*tell_of_files(directory), *tell_of_float8(directory, used), *tell_of_unused(found, used, model)]
        if untied := tie_as_stored(checkpoint, model.all_tied_weights_keys):
            model = model_of(directory, config)
        require_fit(checkpoint, model)
        return replace(checkpoint, warnings=(*warnings, *untied))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first layer's stored weights."""
        first = next(iter(self.stored_weight(0, self.family.mlp.output_weight).files))
        return self.read([first])[first].dtype

    def read_module(self, module: str) -> dict[str, Tensor]:
        """Return the stored tensors of a module outside the decoder layers, by their names in it.

        Raises:
            NonFiniteError: A weight is NaN or infinite.
        """
        tensors = self.read([name for name in self.files if name.rpartition(".")[0] == module])
        return self._require_finite(tensors, f"{module}.", module)

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's stored tensors, by the names in the model's class, relative to the layer.

        Raises:
            NonFiniteError: A weight is NaN or infinite.
        """
        prefix = self.layer_prefix(layer)
        held = self._require_finite(self.read(self.layer_names(layer)), prefix, f"layer {layer}")
        return self._merged(held)

    def read_weight(self, layer: int, name: str) -> Tensor:
        """Return one of a layer's stored tensors, by its name in the model's class, relative to the layer."""
        return self.stored_weight(layer, name).read()

    def stored_weight(self, layer: int, name: str) -> StoredWeight:
        """Return a reference to one of a layer's tensors, by its name in the model's class, relative to the layer."""
        prefix, num_experts = self.layer_prefix(layer), self.family.num_experts(self.config)
        split = None if self.has(layer, name) else self.split_of(name)
        parts = [name] if split is None else split.names(num_experts)
        files = {prefix + part: self.files[prefix + part] for part in parts}
        return StoredWeight(self.directory, files, prefix, split, num_experts)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return stored tensors by their full names; files are closed again after reading."""
        return read_tensors(self.directory, {name: self.files[name] for name in names})

    def num_parameters(self, names: list[str]) -> int:
        """Return the number of scalars in some tensors, without reading them."""
        return sum(math.prod(shape) for shape in self.shapes(names).values())

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors, by their names in the model's class, without reading them."""
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
        """Return the shapes of some tensors by their full names, without reading them."""
        return {name: tuple(stored.get_shape()) for name, stored in self._slices(names)}

    def dtypes(self, names: list[str]) -> dict[str, str]:
        """Return the stored dtypes (from DTYPES) of some tensors by their full names, without reading them."""
        return {name: stored.get_dtype() for name, stored in self._slices(names)}

    def num_bytes(self) -> int:
        """Return the size of the weights: of their files, and what restoring float8 adds."""
        added = {name: place.scale.dtype.itemsize - 1 for name, place in self.files.items() if place.scale is not None}
        restored = sum(math.prod(shape) * added[name] for name, shape in self.shapes(list(added)).items())
        return restored + sum((self.directory / name).stat().st_size for name in self._file_names())

    def digest(self) -> str:
        """Return the SHA-256 of the weight files, in the order of their names."""
        return digest_files(self.directory, self._file_names())

    def _file_names(self) -> list[str]:
        scales = [place.scale.place for place in self.files.values() if place.scale is not None]
        return sorted({place.file for place in (*self.files.values(), *scales)})

    def _slices(self, names: list[str]) -> Iterator[tuple[str, Any]]:
        """Yield tensors' full names and slices, reading only file headers; a slice is valid until the next one."""
        for file_name in sorted({self.files[name].file for name in names}):
            with open_shard(self.directory / file_name) as file:
                for name in [name for name in names if self.files[name].file == file_name]:
                    yield name, file.get_slice(self.files[name].name)

    def _require_finite(self, tensors: dict[str, Tensor], prefix: str, described: str) -> dict[str, Tensor]:
        """Return tensors without the prefix in their names, after checking that all are finite."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{described} of {self.directory} holds NaN or infinity in {name.removeprefix(prefix)}: "
                    f"the checkpoint is damaged; get a fresh copy"
                )
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _merged(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's tensors by their names in the model's class, after merging those stored in parts."""
        num_experts = self.family.num_experts(self.config)
        for stored in self.family.stored:
            if next(stored.names(num_experts)) in held:
                held[stored.name] = stored.merge(held, num_experts)
        return held


def read_tensors(directory: Path, files: dict[str, Place]) -> dict[str, Tensor]:
    """Return stored tensors by name, given each one's place in a directory; float8 weights with scales are restored.

    Raises:
        CheckpointError: A file is missing or broken.
    """
    tensors = {}
    for file_name in sorted({place.file for place in files.values()}):
        with open_shard(directory / file_name) as file:
            for name, place in files.items():
                if place.file == file_name:
                    # Copy, so that the mapped file's pages do not stay in this process's memory.
                    tensors[name] = file.get_tensor(place.name).clone()
    scales = {name: place.scale for name, place in files.items() if place.scale is not None}
    factors = read_tensors(directory, {name: scale.place for name, scale in scales.items()}) if scales else {}
    for name, scale in scales.items():
        tensors[name] = restore(tensors[name], factors[name], scale)
    return tensors
