"""Stores the moments of a calibration pass on disk, one file per layer, so that pruning needs no forward pass.

MOMENTS/moments.json                    which model and data they are from, by digest
MOMENTS/sensitivity-00000.safetensors   how much the loss depends on the layer: attention and mlp (D, D), and output
MOMENTS/layer-00000.safetensors         the layer's moments and elimination paths

A layer's file holds stream_power, and change if it was measured. For attention and mlp each, it holds count, mean,
scatter (block rows of the triangle), input_squares, and gram's elimination path (order, costs,
output_variance). For a mixture of experts, mlp holds the number of experts and of tokens, and the path; the
other arrays are stored for each expert that received tokens, as mlp.0.count and so on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slimllm_ops.decide.paths import LayerPaths, ModulePath
from slimllm_ops.decide.sensitivity import Sensitivity
from slimllm_ops.errors import InputError
from slimllm_ops.files import NotPlainError, read_json_object, require_plain, write_json, written_whole
from slimllm_ops.models.pair import MODULES, Pair
from slimllm_ops.moments.observation import Observed
from slimllm_ops.moments.ranking import Ranking
from slimllm_ops.moments.routing import observed_from_arrays

FORMAT = 3
MANIFEST = "moments.json"
MOST_BYTES = 1 << 20
MANIFEST_FIELDS = {"model": str, "model_digest": str, "calibration": dict}


class MomentStore:
    """A directory of moments, written and read one layer at a time.

    Args:
        directory: The directory of the files.
        intercept: Whether recoveries from the moments that `load_moments` returns may fit an intercept.
    """

    def __init__(self, directory: Path, intercept: bool = True) -> None:
        self.directory = directory
        self.intercept = intercept

    def save_sensitivity(self, layer: int, sensitivity: Sensitivity) -> None:
        """Write a layer's sensitivity."""
        self.directory.mkdir(parents=True, exist_ok=True)
        arrays = dict(zip(MODULES, sensitivity.modules, strict=True)) | {"output": np.array([sensitivity.output])}
        with written_whole(self._sensitivity_path(layer)) as partial:
            save_file(arrays, partial)

    def has_sensitivity(self, layer: int) -> bool:
        """Return whether a layer's sensitivity is stored."""
        return self._sensitivity_path(layer).exists()

    def load_sensitivity(self, layer: int) -> Sensitivity:
        """Read a layer's sensitivity.

        Raises:
            InputError: The file is missing or broken.
        """
        with _opened(self._sensitivity_path(layer)) as file:
            return Sensitivity(Pair(*map(file.get_tensor, MODULES)), _list(file, "output")[0])

    def save(self, layer: int, paths: LayerPaths, attention: Observed, mlp: Observed) -> None:
        """Write a layer's file."""
        arrays = {"stream_power": np.array([paths.stream_power])}
        if paths.change is not None:
            arrays["change"] = np.array([paths.change])
        for module, path, observed in (("attention", paths.attention, attention), ("mlp", paths.mlp, mlp)):
            packed = _pack_path(path) | observed.to_arrays()
            arrays |= {f"{module}.{name}": np.ascontiguousarray(array) for name, array in packed.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path(layer)) as partial:
            save_file(arrays, partial)

    def num_saved(self, num_layers: int) -> int:
        """Return the number of layers stored without a gap, counted from the first."""
        return next((layer for layer in range(num_layers) if not self._path(layer).exists()), num_layers)

    def load_paths(self, layer: int) -> LayerPaths:
        """Read a layer's paths, without its moments.

        Raises:
            InputError: The file is missing or broken.
        """
        with _opened(self._path(layer)) as file:
            attention, mlp = (
                ModulePath(
                    Ranking(tuple(_list(file, f"{module}.order")), tuple(_list(file, f"{module}.costs"))),
                    _list(file, f"{module}.output_variance")[0],
                )
                for module in MODULES
            )
            change = _list(file, "change")[0] if "change" in file.keys() else None  # noqa: SIM118 - no mapping
            return LayerPaths(attention, mlp, _list(file, "stream_power")[0], change)

    def load_moments(self, layer: int, module: str) -> Observed:
        """Read the moments of a layer's "attention" or "mlp".

        Raises:
            InputError: The file is missing or broken.
        """
        with _opened(self._path(layer)) as file:
            names = [name for name in file.keys() if name.startswith(f"{module}.")]  # noqa: SIM118 - no mapping
            arrays = {name.removeprefix(f"{module}."): file.get_tensor(name) for name in names}
        return observed_from_arrays(arrays).with_intercept(self.intercept)

    def seal(self, manifest: dict[str, Any]) -> None:
        """Write the manifest; call this last, because it marks the moments as complete."""
        write_json(self.directory / MANIFEST, {"format": FORMAT} | manifest, indent=1)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, which names the model and data that the moments are from.

        Raises:
            InputError: The directory holds no complete moments in this format.
        """
        path = self.directory / MANIFEST
        if not path.exists():
            raise InputError(f"{self.directory} holds no moments ({MANIFEST} is missing): run `slimllm calibrate`")
        manifest = read_json_object(path, MOST_BYTES)
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{path} has format {manifest.get('format')}, expected {FORMAT}: run `slimllm calibrate` again"
            )
        for name, kind in MANIFEST_FIELDS.items():
            if not isinstance(manifest.get(name), kind):
                raise InputError(
                    f"{path} has no valid {name}, expected a {kind.__name__}: run `slimllm calibrate` again"
                )
        return manifest

    def _path(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:05d}.safetensors"

    def _sensitivity_path(self, layer: int) -> Path:
        return self.directory / f"sensitivity-{layer:05d}.safetensors"


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Open a file of arrays.

    Raises:
        InputError: It is missing or broken.
    """
    try:
        require_plain(path)
        with safe_open(path, framework="np") as file:
            yield file
    except (FileNotFoundError, NotPlainError, SafetensorError) as error:
        raise InputError(f"{path} is missing or broken ({error}): run `slimllm calibrate` again") from error


def _pack_path(path: ModulePath) -> dict[str, np.ndarray]:
    return {
        "order": np.array(path.ranking.order),
        "costs": np.array(path.ranking.costs),
        "output_variance": np.array([path.output_variance]),
    }


def _list(file: safe_open, name: str) -> list[Any]:
    return file.get_tensor(name).tolist()
