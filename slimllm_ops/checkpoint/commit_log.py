"""Records on disk which layers of a model are solved, so that a run can resume after its process ends.

LOG/start.npz            the ids (T,) of a few tokens, and their hidden states (T, D) before the first layer
LOG/layer-00000.npy      their hidden states after the layer, as the run computed them
LOG/layer-00000.json     the layer's decisions; written last, it commits the layer

Shapes: T tokens, D hidden size.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.files import open_plain, read_plain, write_json, written_whole

# The largest record of a layer that is read; the widest layer has some megabytes.
MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Probe:
    """The ids (T,) of some tokens, and their hidden states (T, D) before the first layer and after each layer."""

    ids_T: np.ndarray
    states_TD: list[np.ndarray]


class CommitLog:
    """The solved layers of a model, in order; opening the directory again continues where the last run stopped.

    It continues before the first damaged record, as a power cut may leave one; later records are deleted.

    Args:
        directory: The directory of the log; created if missing.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.plans: list[LayerPlan] = list(self._committed())
        for path in directory.glob("layer-*.json"):
            if int(path.stem.removeprefix("layer-")) >= len(self.plans):
                path.unlink()

    def __len__(self) -> int:
        """Return the number of committed layers, including dropped ones."""
        return len(self.plans)

    @property
    def num_kept(self) -> int:
        """The number of committed layers that the pruned model keeps."""
        return sum(not plan.dropped for plan in self.plans)

    def begin(self, ids_T: np.ndarray, state_TD: np.ndarray) -> None:
        """Record the probe's tokens, and their states before the first layer."""
        with written_whole(self._directory / "start.npz") as partial, partial.open("wb") as file:
            np.savez(file, ids_T=ids_T, state_TD=state_TD)

    def commit(self, plan: LayerPlan, state_TD: np.ndarray) -> None:
        """Record the next layer's decisions and output states, once its weights are written."""
        layer = len(self.plans)
        with written_whole(self._path(layer, "npy")) as partial, partial.open("wb") as file:
            np.save(file, state_TD)
        # A refit's weights are as large as the layer, and are already in the layer's shard.
        self.plans.append(plan.recorded())
        write_json(self._path(layer, "json"), self.plans[-1].describe())

    def last_state(self) -> np.ndarray:
        """Return the states (T, D) after the last committed layer, or before the first if none is committed."""
        return self._state(len(self) - 1)

    def probe(self) -> Probe:
        """Return the recorded tokens and their states after each layer that the pruned model keeps."""
        kept = [layer for layer, plan in enumerate(self.plans) if not plan.dropped]
        with open_plain(self._directory / "start.npz") as file, np.load(file) as start:
            return Probe(start["ids_T"], [self._state(layer) for layer in (-1, *kept)])

    def _committed(self) -> Iterator[LayerPlan]:
        """Yield the decisions of the committed layers, up to the first layer with a missing or damaged file."""
        with suppress(OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            self._state(-1)
            for layer in count():
                self._state(layer)
                yield LayerPlan.parse(json.loads(read_plain(self._path(layer, "json"), MOST_BYTES)))

    def _state(self, layer: int) -> np.ndarray:
        """Return the states after a layer, or before the first for -1."""
        if layer >= 0:
            with open_plain(self._path(layer, "npy")) as file:
                return np.load(file)
        with open_plain(self._directory / "start.npz") as file, np.load(file) as start:
            return start["state_TD"]

    def _path(self, layer: int, kind: str) -> Path:
        return self._directory / f"layer-{layer:05d}.{kind}"
