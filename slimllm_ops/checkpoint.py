"""Reading a Hugging Face checkpoint a layer at a time: no process ever holds the whole model."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from slimllm_ops.errors import CheckpointError, NonFiniteError
from slimllm_ops.families import Family, family_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
                in safetensors, or the architecture is unknown.
        """
        directory = Path(directory)
        config = _read_config(directory)
        checkpoint = cls(directory, config, family_of(config), _locate_tensors(directory))
        checkpoint._require_layers()
        return checkpoint

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the first layer's weights are stored in."""
        return self.read([self.layer_prefix(0) + self.family.mlp.output_weight]).popitem()[1].dtype

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
        return sorted({name.rpartition(".")[0] for name in names})

    def read_module(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a module outside the decoder layers as stored, by their names in it.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        tensors = self.read([name for name in self.files if name.rpartition(".")[0] == module])
        return self._require_finite(tensors, f"{module}.", module)

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Return one layer's tensors as stored, by their names relative to the layer.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        prefix = self.layer_prefix(layer)
        return self._require_finite(self.read(self.layer_names(layer)), prefix, f"layer {layer}")

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors by their full names, as stored; files are opened only for as long as it takes."""
        return read_tensors(self.directory, {name: self.files[name] for name in names})

    def num_parameters(self, names: list[str]) -> int:
        """Return how many scalars tensors hold, without reading them."""
        return sum(math.prod(shape) for shape in self.shapes(names).values())

    def shapes(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors by their full names, without reading them."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file_name in sorted({self.files[name] for name in names}):
            with _opened(self.directory / file_name) as file:
                held = [name for name in names if self.files[name] == file_name]
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in held}
        return shapes

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
        for layer in range(self.num_layers):
            if not self.layer_names(layer):
                raise CheckpointError(
                    f"{self.directory} has no tensors of layer {layer}, though its config.json names "
                    f"{self.num_layers} layers: the checkpoint is incomplete"
                )
            for branch in (self.family.attention, self.family.mlp):
                for name in (*branch.input_weights, branch.output_weight):
                    if not self.has(layer, name):
                        raise CheckpointError(
                            f"layer {layer} of {self.directory} has no {name}: the checkpoint is incomplete"
                        )


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


def _read_config(directory: Path) -> PretrainedConfig:
    if not directory.is_dir():
        raise CheckpointError(f"model directory {directory} does not exist: pass a directory or a hub id")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    try:
        described = json.loads((directory / "config.json").read_text())
        if not isinstance(described, dict):
            raise ValueError(f"it holds a {type(described).__name__}, expected an object")
    except ValueError as error:
        raise CheckpointError(f"{directory / 'config.json'} is not valid JSON: {error}") from error
    try:
        return AutoConfig.from_pretrained(directory)
    # Any: transformers and its validators raise a dozen kinds, and a config that they refuse is always the cause.
    except Exception as error:
        kind = described.get("model_type") or described.get("architectures") or "no model_type"
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"the architecture of {directory} ({kind}) is unknown, or its config.json is wrong: {reason}"
        ) from error


def _locate_tensors(directory: Path) -> dict[str, str]:
    """Return which file holds which tensor, having opened every file."""
    if (directory / INDEX).is_file():
        try:
            expected = json.loads((directory / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{directory / INDEX} is truncated or broken: download it again") from error
        file_names = sorted(set(expected.values()))
    elif (directory / SINGLE).is_file():
        expected, file_names = None, [SINGLE]
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
    missing = sorted(set(expected or ()) - set(located))
    if missing:
        raise CheckpointError(f"{directory}: {INDEX} names {missing[0]}, which no shard holds: download it again")
    return located


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"shard {path.name} of {path.parent} is missing: download it again") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"shard {path.name} of {path.parent} is truncated or broken ({error}): download it again"
        ) from error
