"""Holds what a report shows of a run, however it was read: from a directory, from MLflow, or from the run itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.json_values import json_value
from slimllm_ops.decide.plan import LayerPlan, Plan


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A pruned model: its plan, its seconds by stage, and what was measured of it later.

    Attributes:
        name: What tells it apart from other runs, such as its directory's name; empty if it stands alone.
        header: The plan's settings, totals and trainings.
        layers: The plan of each dense layer; empty if slimllm did not prune the model.
        seconds: Seconds by stage; empty if they are not known.
        directory: The checkpoint on this machine; None if only its record is at hand.
        run_id: The run's id, if it was read from MLflow.
    """

    name: str = ""
    header: Mapping[str, Any]
    layers: tuple[LayerPlan, ...]
    seconds: Mapping[str, float]
    directory: Path | None = None
    run_id: str | None = None

    @property
    def params(self) -> Mapping[str, Any]:
        """The settings that the model was pruned with."""
        return mapping_at(self.header, "params")

    @property
    def totals(self) -> Mapping[str, Any]:
        """The figures of the pruning."""
        return mapping_at(self.header, "totals")

    @property
    def trainings(self) -> Sequence[Mapping[str, Any]]:
        """The settings and figures of each training after the pruning."""
        found = self.header.get("tuned")
        return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []

    @property
    def sparsity(self) -> float | None:
        """The fraction of the decoder layers' parameters that was removed."""
        return number_at(self.totals, "sparsity")

    @property
    def model(self) -> str:
        """The name of the dense model."""
        return Path(str(self.params.get("model") or "model")).name

    @property
    def method(self) -> str:
        """The method of the pruning, and those of the trainings after it."""
        refined = " --refine" if self.params.get("refine") else ""
        trained = [str(mapping_at(one, "params").get("method")) for one in self.trainings]
        return ", then ".join([f"{self.params.get('method') or 'not pruned'}{refined}", *trained])

    @property
    def label(self) -> str:
        """A short name: the method and the sparsity, and the name if there is one."""
        amount = "" if self.sparsity is None else f" at {self.sparsity:.1%}"
        return f"{self.method}{amount}{f' ({self.name})' if self.name else ''}"


def run_of(plan: Plan, seconds: Mapping[str, float], directory: Path | None = None) -> ReportedRun:
    """Return a run by its plan, and its seconds by stage."""
    stages = {stage.replace(",", ""): value for stage, value in seconds.items()}
    return ReportedRun(header=json_value(plan.header), layers=plan.layers, seconds=stages, directory=directory)


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """What `evaluation.json` says of a model."""

    model: str
    perplexity: Sequence[Mapping[str, Any]]
    tasks: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Everything that a report shows.

    Attributes:
        runs: The pruned models.
        comparisons: What `comparison.json` of each comparison holds.
        evaluations: The models of each `evaluation.json`.
        speeds: The rows of each `bench.json`.
    """

    runs: tuple[ReportedRun, ...] = ()
    comparisons: tuple[Mapping[str, Any], ...] = ()
    evaluations: tuple[MeasuredModel, ...] = ()
    speeds: tuple[Mapping[str, Any], ...] = field(default=())

    def __add__(self, other: "Sources") -> "Sources":
        """Return what both hold."""
        return Sources(
            runs=self.runs + other.runs,
            comparisons=self.comparisons + other.comparisons,
            evaluations=self.evaluations + other.evaluations,
            speeds=self.speeds + other.speeds,
        )

    def __bool__(self) -> bool:
        """Return whether there is anything to show."""
        return bool(self.runs or self.comparisons or self.evaluations or self.speeds)


def mapping_at(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping by its name; an empty one if there is none."""
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def rows_at(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the mappings in a list by its name; none if there is no list."""
    found = values.get(name)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list | tuple) else []


def pairs_at(values: Mapping[str, Any], name: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the pairs of mappings in a list by its name; none if there is no list."""
    found = values.get(name)
    pairs = [rows_at({name: one}, name) for one in found] if isinstance(found, list | tuple) else []
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def number_at(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number by its name; None if there is none."""
    found = values.get(name)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None
