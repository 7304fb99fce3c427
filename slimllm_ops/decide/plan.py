"""Decisions as values: what each module becomes, and the plan from which a pruned model is rebuilt."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.recovery import Line
from slimllm_ops.models.families import unit_rows

Recovery = Line | Refit
# What a layer's plan says beside its decisions.
LAYER_FIELDS = ("similarity", "ratio", "relative_change", "dropped")


@dataclass(frozen=True)
class Decision:
    """What one module (attention or MLP) becomes: the units that stay, ascending, and what recovers the rest.

    Units are KV groups or channels; `scores` has one for each of the dense module's, as the method defines it.
    A decision that was read from a plan has no recovery where that is a refit, whose weights are the checkpoint's.
    `with_bias` says whether recovery gives the output projection a bias, which it else has only if it had one.
    `idle_experts` are those of an MLP's experts that no calibration token was sent to.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    recovery: Recovery | None
    relative_error: float
    with_bias: bool = True
    idle_experts: tuple[int, ...] = ()

    @property
    def num_units(self) -> int:
        """How many units the dense module has."""
        return len(self.scores)

    @property
    def num_removed(self) -> int:
        """How many units go."""
        return self.num_units - len(self.kept)

    def recorded(self) -> "Decision":
        """Return the decision as a plan keeps it: without the weights of a refit."""
        return self if isinstance(self.recovery, Line) else replace(self, recovery=None)

    def kept_rows(self, num_rows: int) -> Tensor:
        """Return which of `num_rows` rows stay, where each unit has an equal share of them, side by side."""
        return unit_rows(self.kept, self.num_units, num_rows)


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer of the dense model: its decisions; None leaves a module whole.

    The paper's method allocates by the layer's similarity s_l and its ratio; other methods have none. Where layers may
    go as a whole, `relative_change` is E|h_out - h_in|^2 / E|h_out|^2, and a layer that is `dropped` is not in the
    pruned model, whose layers are those that stay, in their order.
    """

    attention: Decision | None = None
    mlp: Decision | None = None
    similarity: float | None = None
    ratio: float | None = None
    relative_change: float | None = None
    dropped: bool = False

    def recorded(self) -> "LayerPlan":
        """Return the layer as a plan keeps it."""
        attention = self.attention and self.attention.recorded()
        return replace(self, attention=attention, mlp=self.mlp and self.mlp.recorded())

    def describe(self) -> dict[str, Any]:
        """Return the layer as JSON has it."""
        decisions = {"attention": _describe(self.attention), "mlp": _describe(self.mlp)}
        return {name: getattr(self, name) for name in LAYER_FIELDS} | decisions

    @classmethod
    def parse(cls, described: dict[str, Any]) -> "LayerPlan":
        """Return the layer that `describe` described."""
        attention, mlp = _parse(described["attention"]), _parse(described["mlp"])
        return cls(attention, mlp, **{name: described[name] for name in LAYER_FIELDS})


@dataclass(frozen=True)
class Plan:
    """Every decision of a run, under a header of settings and digests."""

    header: dict[str, Any]
    layers: tuple[LayerPlan, ...]

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(self.header | {"layers": [layer.describe() for layer in self.layers]}))

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan that `write` wrote."""
        header = json.loads(path.read_text())
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
