"""What is solved of a model, a layer at a time, and outlives its process.

LOG/start.npz            a few tokens' ids (T,), and their hidden states (T, D) before the first layer
LOG/layer-00000.npy      their hidden states after the layer, as the run computed them
LOG/layer-00000.json     the layer's decisions, written last: with it the layer is committed

Shapes: T tokens, D hidden size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.files import write_json, written_whole


@dataclass(frozen=True)
class Probe:
    """Some tokens' ids (T,) and hidden states (T, D) before the first layer and after each."""

    ids_T: np.ndarray
    states_TD: list[np.ndarray]


class CommitLog:
    """The layers of a model that are solved, in order; one that is opened again goes on where the last one ended.

    Args:
        directory: where it is kept; made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.plans: list[LayerPlan] = []
        while (path := self._path(len(self.plans), "json")).exists():
            self.plans.append(LayerPlan.parse(json.loads(path.read_text())))

    def __len__(self) -> int:
        """How many layers are committed, those that are dropped included."""
        return len(self.plans)

    @property
    def num_kept(self) -> int:
        """How many of them the pruned model has."""
        return sum(not plan.dropped for plan in self.plans)

    def begin(self, ids_T: np.ndarray, state_TD: np.ndarray) -> None:
        """Note the tokens whose states are followed, and their states before the first layer."""
        with written_whole(self._directory / "start.npz") as partial, partial.open("wb") as file:
            np.savez(file, ids_T=ids_T, state_TD=state_TD)

    def commit(self, plan: LayerPlan, state_TD: np.ndarray) -> None:
        """Note the next layer's decisions and what it leaves, once its weights are written."""
        layer = len(self.plans)
        with written_whole(self._path(layer, "npy")) as partial, partial.open("wb") as file:
            np.save(file, state_TD)
        # The weights of a refit are as large as the layer, and in its file.
        self.plans.append(plan.recorded())
        write_json(self._path(layer, "json"), self.plans[-1].describe())

    def last_state(self) -> np.ndarray:
        """Return the states (T, D) that the last committed layer leaves, or those before the first."""
        return self._state(len(self) - 1)

    def probe(self) -> Probe:
        """Return the states that were followed, of the layers that the pruned model has."""
        kept = [layer for layer, plan in enumerate(self.plans) if not plan.dropped]
        with np.load(self._directory / "start.npz") as start:
            return Probe(start["ids_T"], [self._state(layer) for layer in (-1, *kept)])

    def _state(self, layer: int) -> np.ndarray:
        """Return the states after a layer; -1 is before the first."""
        if layer >= 0:
            return np.load(self._path(layer, "npy"))
        with np.load(self._directory / "start.npz") as start:
            return start["state_TD"]

    def _path(self, layer: int, kind: str) -> Path:
        return self._directory / f"layer-{layer:05d}.{kind}"
