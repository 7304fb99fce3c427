"""Decisions as values: one for each module, collected in the plan that a pruned model is rebuilt from."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.recovery import Line
from slimllm_ops.files import read_plain, write_text
from slimllm_ops.models.families import unit_rows

Recovery = Line | Refit
# The largest plan that is read; the largest models have some hundred megabytes.
MOST_BYTES = 1 << 30
# The fields of a layer's plan besides its decisions.
LAYER_FIELDS = ("similarity", "ratio", "relative_change", "dropped")


@dataclass(frozen=True)
class Decision:
    """The units that stay in one module (attention or MLP), ascending, and the recovery of its output.

    Units are KV groups or channels. `scores` has the importance of each unit of the dense module, in the
    method's own measure: the higher, the more the unit matters.
    `recovery` is None if it was a refit and the decision was read from a plan: its weights are in the checkpoint.
    `with_bias` says whether recovery gives the output projection a bias; if not, it keeps the one it had, if any.
    `idle_experts` are the experts of an MLP that received no calibration tokens.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    recovery: Recovery | None
    relative_error: float
    with_bias: bool = True
    idle_experts: tuple[int, ...] = ()

    @property
    def num_units(self) -> int:
        """The number of units in the dense module."""
        return len(self.scores)

    @property
    def num_removed(self) -> int:
        """The number of units removed."""
        return self.num_units - len(self.kept)

    def recorded(self) -> "Decision":
        """Return the decision as a plan stores it: without the weights of a refit."""
        return self if isinstance(self.recovery, Line) else replace(self, recovery=None)

    def kept_rows(self, num_rows: int) -> Tensor:
        """Return which of `num_rows` rows stay, if each unit owns an equal, contiguous share of them."""
        return unit_rows(self.kept, self.num_units, num_rows)


@dataclass(frozen=True)
class LayerPlan:
    """The decisions for one decoder layer of the dense model; a module whose decision is None is not pruned.

    `similarity` (s_l) and `ratio` are set by the paper's method only, which allocates by them. If whole layers may be
    dropped, `relative_change` is E|h_out - h_in|^2 / E|h_out|^2. A layer that is `dropped` is missing from the pruned
    model, which has the other layers in their order.
    """

    attention: Decision | None = None
    mlp: Decision | None = None
    similarity: float | None = None
    ratio: float | None = None
    relative_change: float | None = None
    dropped: bool = False

    def recorded(self) -> "LayerPlan":
        """Return the layer as a plan stores it."""
        attention = self.attention and self.attention.recorded()
        return replace(self, attention=attention, mlp=self.mlp and self.mlp.recorded())

    def describe(self) -> dict[str, Any]:
        """Return the layer as a JSON object."""
        decisions = {"attention": _describe(self.attention), "mlp": _describe(self.mlp)}
        return {name: getattr(self, name) for name in LAYER_FIELDS} | decisions

    @classmethod
    def parse(cls, described: dict[str, Any]) -> "LayerPlan":
        """Return the layer from the JSON object that `describe` returned."""
        attention, mlp = _parse(described["attention"]), _parse(described["mlp"])
        return cls(attention, mlp, **{name: described[name] for name in LAYER_FIELDS})


@dataclass(frozen=True)
class Plan:
    """Every decision of a run, with a header of settings and digests."""

    header: dict[str, Any]
    layers: tuple[LayerPlan, ...]

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_text(path, json.dumps(self.header | {"layers": [layer.describe() for layer in self.layers]}))

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan that `write` wrote."""
        header = json.loads(read_plain(path, MOST_BYTES))
        return cls(header, tuple(map(LayerPlan.parse, header.pop("layers"))))


def _describe(decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    described = {
        "kept": list(decision.kept),
        "scores": list(decision.scores),
        "relative_error": decision.relative_error,
        "with_bias": decision.with_bias,
    }
    if decision.idle_experts:
        described["idle_experts"] = list(decision.idle_experts)
    if isinstance(decision.recovery, Line):
        described["scale"] = decision.recovery.scale_D.tolist()
        described["bias"] = decision.recovery.bias_D.tolist()
    return described


def _parse(described: dict[str, Any] | None) -> Decision | None:
    if described is None:
        return None
    line = None
    if "scale" in described:
        scale_D = torch.tensor(described["scale"], dtype=torch.float64)
        line = Line(scale_D, torch.tensor(described["bias"], dtype=torch.float64), described["relative_error"])
    return Decision(
        tuple(described["kept"]),
        tuple(described["scores"]),
        line,
        described["relative_error"],
        described["with_bias"],
        tuple(described.get("idle_experts", ())),
    )
