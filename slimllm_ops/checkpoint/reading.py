"""Reading a Hugging Face checkpoint a layer at a time: no process ever holds the whole model."""

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slimllm_ops.errors import CheckpointError, NonFiniteError, shown
from slimllm_ops.models.config_checks import LARGEST_INDEX, read_config, read_json_object, wrong_config
from slimllm_ops.models.families import Family, family_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What weights may be stored in, as safetensors calls it.
DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that was found whole: its config, its family, and which file holds which tensor."""

    directory: Path
    config: PretrainedConfig
    family: Family
    files: dict[str, str]

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Check a model directory and return it.

        Raises:
            CheckpointError: the directory, its config or a shard is missing or broken, the weights are not
                in safetensors or do not fit the config, or the architecture is unknown.
        """
        directory = Path(directory)
        config = read_config(directory)
        checkpoint = cls(directory, config, family_of(config), _locate_tensors(directory))
        # What the config describes is built only where every one of its layers is there.
        checkpoint._require_layers()
        checkpoint._require_fit()
        return checkpoint

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the first layer's weights are stored in."""
        name = self._held_names(0, self.family.mlp.output_weight)[0]
        return self.read([name]).popitem()[1].dtype

    def layer_prefix(self, layer: int) -> str:
        """Return what the names of a layer's tensors begin with."""
        return f"{self.family.layers}.{layer}."

    def layer_names(self, layer: int) -> list[str]:
        """Return the full names of one layer's tensors."""
        return [name for name in self.files if name.startswith(self.layer_prefix(layer))]

    def has(self, layer: int, name: str) -> bool:
        """Return whether a layer has a tensor of that name, relative to the layer."""
        return self.layer_prefix(layer) + name in self.files

    def outside(self) -> list[str]:
        """Return the modules that hold the tensors outside the decoder layers: embeddings, final norm, head."""
        names = [name for name in self.files if not name.startswith(f"{self.family.layers}.")]
        called = {stored: module for module, stored in self.family.stored_as}
        stored = {name.rpartition(".")[0] for name in names}
        return sorted(called.get(module, module) for module in stored)

    def read_module(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a module outside the decoder layers as stored, by their names in it.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        stored = self._stored_name(f"{module}.").removesuffix(".")
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
        prefix = self.layer_prefix(layer)
        held = self.read(self._held_names(layer, name))
        return self._merged({key.removeprefix(prefix): tensor for key, tensor in held.items()})[name]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors by their full names, as stored; files are opened only for as long as it takes."""
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
            with _opened(self.directory / file_name) as file:
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

    def _require_layers(self) -> None:
        prefix = f"{self.family.layers}."
        found = {name.removeprefix(prefix).partition(".")[0] for name in self.files if name.startswith(prefix)}
        for layer in range(self.num_layers):
            if str(layer) not in found:
                raise CheckpointError(
                    f"{self.directory} has no tensors of layer {layer}, though its config.json names "
                    f"{self.num_layers} layers: the checkpoint is incomplete"
                )

    def _require_fit(self) -> None:
        """Compare names, shapes and dtypes with those of the model that the config describes."""
        model = _build_on_meta(self.directory, self.config)
        # Tied weights are one parameter of two names, of which the checkpoint may have one.
        for name, parameter in model.named_parameters():
            for held, _ in self._held(name, tuple(parameter.shape)):
                if held not in self.files:
                    described, key = self._place_of(held)
                    raise CheckpointError(f"{described} has no {key}: the checkpoint is incomplete")
        modules = {name for name, _ in model.named_modules() if name}
        if unknown := [name for name in self.outside() if name not in modules]:
            raise CheckpointError(
                f"{self.directory} holds tensors of {shown(unknown[0]) or 'no module'}, which a "
                f"{self.config.model_type} model has not: save it anew by transformers' save_pretrained"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stored_shapes = (one for name, shape in shapes.items() for one in self._held(name, shape))
        expected = {name: shape for name, shape in stored_shapes if name in self.files}
        for file_name in sorted({self.files[name] for name in expected}):
            with _opened(self.directory / file_name) as file:
                for name in [name for name in expected if self.files[name] == file_name]:
                    stored = file.get_slice(name)
                    self._require_stored(name, stored.get_dtype(), tuple(stored.get_shape()), expected[name])

    def _require_stored(self, name: str, dtype: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        described, key = self._place_of(name)
        if shape != expected:
            raise CheckpointError(f"{described} does not fit its config.json: {key} is {shape}, expected {expected}")
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{described} holds {key} as {dtype}: pass the model in bfloat16, float16 or float32, not quantised"
            )

    def _stored_name(self, name: str) -> str:
        """Return what the files call a tensor of the model, by its full name."""
        for module, stored in self.family.stored_as:
            renamed = f"{stored}.{name.removeprefix(f'{module}.')}"
            if name.startswith(f"{module}.") and any(one.startswith(f"{stored}.") for one in self.files):
                return renamed
        return name

    def _held(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield what the files hold in the place of a tensor of the model, by its full name: names and shapes."""
        prefix, _, key = name.removeprefix(f"{self.family.layers}.").partition(".")
        split = next((one for one in self.family.stored if one.name == key), None)
        if split is None or name in self.files:
            yield self._stored_name(name), shape
            return
        for part in split.names(self.family.num_experts(self.config)):
            yield f"{self.family.layers}.{prefix}.{part}", split.part_shape(shape)

    def _held_names(self, layer: int, name: str) -> list[str]:
        """Return the names of what the files hold in the place of a layer's tensor."""
        full = self.layer_prefix(layer) + name
        split = next((one for one in self.family.stored if one.name == name), None)
        if split is None or full in self.files:
            return [full]
        return [self.layer_prefix(layer) + part for part in split.names(self.family.num_experts(self.config))]

    def _merged(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of a layer by what the class calls them; those that are held in parts are put together."""
        num_experts = self.family.num_experts(self.config)
        for stored in self.family.stored:
            if next(stored.names(num_experts)) in held:
                held[stored.name] = stored.merge(held, num_experts)
        return held

    def _place_of(self, name: str) -> tuple[str, str]:
        """Return which layer of which directory a tensor is of, and its name there."""
        prefix = f"{self.family.layers}."
        if not name.startswith(prefix):
            return str(self.directory), name
        layer, _, key = name.removeprefix(prefix).partition(".")
        return f"layer {layer} of {self.directory}", key


def read_tensors(directory: Path, files: dict[str, str]) -> dict[str, Tensor]:
    """Return tensors as stored, from a map of their names to files in a directory.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    tensors = {}
    for file_name in sorted(set(files.values())):
        with _opened(directory / file_name) as file:
            for name in files:
                if files[name] == file_name:
                    # A copy, so that the mapped file's pages do not stay in this process's memory.
                    tensors[name] = file.get_tensor(name).clone()
    return tensors


def _build_on_meta(directory: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model that a config describes, without memory for it."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
    # Any: whatever a layer's constructor stumbles over is what the config says of it.
    except Exception as error:
        raise wrong_config(directory, error) from error
    return model


def _locate_tensors(directory: Path) -> dict[str, str]:
    """Return which file holds which tensor, having opened every file."""
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
        with _opened(directory / file_name) as file:
            located.update(dict.fromkeys(file.keys(), file_name))
    missing = sorted(set(expected) - set(located))
    if missing:
        raise CheckpointError(
            f"{directory}: {INDEX} names {shown(missing[0])}, which no shard holds: download it again"
        )
    return located


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return which file an index expects every tensor in; all of them are files of its own directory."""
    weight_map = read_json_object(path, LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is truncated or broken (it has no weight_map): download it again")
    for name, file_name in weight_map.items():
        # A name of this form is no path: it has no separator of any system, is not "..", and is no pickle's.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w-][\w .-]*\.safetensors", file_name):
            raise CheckpointError(
                f"{path} says that {shown(name)} is in {shown(repr(file_name))}, which is no name of a safetensors "
                f"file beside it: download it again"
            )
    return weight_map


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        # A pipe of that name would be waited for.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"shard {path.name} of {path.parent} is no file: download it again")
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
