"""Decisions as values: what each module becomes, and the plan from which a pruned model is rebuilt."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimllm_ops.recovery import Line


@dataclass(frozen=True)
class Decision:
    """What one module (attention or MLP) becomes: the units that stay, ascending, and what recovers the rest.

    Units are KV groups or channels; `scores` has one for each of the dense module's, as the method defines it.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    recovery: Line

    @property
    def num_units(self) -> int:
        """How many units the dense module has."""
        return len(self.scores)

    @property
    def num_removed(self) -> int:
        """How many units go."""
        return self.num_units - len(self.kept)

    def kept_rows(self, num_rows: int) -> Tensor:
        """Return which of `num_rows` rows stay, where each unit has an equal share of them, side by side."""
        width = num_rows // self.num_units
        return (torch.tensor(self.kept)[:, None] * width + torch.arange(width)).flatten()


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: its similarity s_l, its ratio, and its decisions; None leaves a module whole."""

    similarity: float
    ratio: float
    attention: Decision | None = None
    mlp: Decision | None = None


@dataclass(frozen=True)
class Plan:
    """Every decision of a run, under a header of settings and digests."""

    header: dict[str, Any]
    layers: tuple[LayerPlan, ...]

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(self.header | {"layers": [_describe_layer(layer) for layer in self.layers]}))

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan that `write` wrote."""
        header = json.loads(path.read_text())
        layers = tuple(
            LayerPlan(layer["similarity"], layer["ratio"], _parse(layer["attention"]), _parse(layer["mlp"]))
            for layer in header.pop("layers")
        )
        return cls(header, layers)


def _describe_layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "similarity": layer.similarity,
        "ratio": layer.ratio,
        "attention": _describe(layer.attention),
        "mlp": _describe(layer.mlp),
    }


def _describe(decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    line = decision.recovery
    return {
        "kept": list(decision.kept),
        "scores": list(decision.scores),
        "relative_error": line.relative_error,
        "scale": line.scale_D.tolist(),
        "bias": line.bias_D.tolist(),
    }


def _parse(described: dict[str, Any] | None) -> Decision | None:
    if described is None:
        return None
    scale_D = torch.tensor(described["scale"], dtype=torch.float64)
    bias_D = torch.tensor(described["bias"], dtype=torch.float64)
    line = Line(scale_D, bias_D, described["relative_error"])
    return Decision(tuple(described["kept"]), tuple(described["scores"]), line)
