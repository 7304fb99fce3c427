"""Runs to report: a sweep with its figures, and small plans of any content."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.pipeline import PruneResult

WritePlan = Callable[..., Path]


def decision(kept: list[int], total: int, error: float = 0.1) -> dict[str, Any]:
    """A module's decision as a plan has it."""
    return {"kept": kept, "scores": [1.0] * total, "relative_error": error, "with_bias": False}


def layer(attention: dict[str, Any] | None, mlp: dict[str, Any] | None, **changed: Any) -> dict[str, Any]:
    """A layer as a plan has it."""
    fields = {"similarity": None, "ratio": None, "relative_change": None, "dropped": False}
    return {**fields, **changed, "attention": attention, "mlp": mlp}


@pytest.fixture
def write_plan(tmp_path: Path) -> WritePlan:
    """Write the plan of a small run, and return the directory of its checkpoint."""

    def write(name: str = "pruned", layers: list[dict[str, Any]] | None = None, **changed: Any) -> Path:
        totals = {
            "parameters_before": 1000,
            "parameters_after": 800,
            "bytes_before": 4000,
            "bytes_after": 3200,
            "sparsity": 0.2,
            "perplexity": {"held-out.txt": [10.0, 12.5]},
            "evaluated": {"held-out.txt": {"tokens": 256, "block_length": 64}},
        }
        params = {"model": "models/dense", "method": "gram", "model_digest": "d1ce5t", "seed": 0}
        some = [layer(decision([0, 2], 3), decision([0], 4, 0.2)), layer(None, decision([1, 2, 3], 4, 0.3))]
        plan = {"format": 1, "params": params, "totals": totals, "layers": some if layers is None else layers}
        path = tmp_path / name / "pruning" / "plan.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(plan | changed))
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def sweep(prune_model: Callable[..., PruneResult], gqa_model: Path, held_out_file: Path) -> Path:
    """The output of a sweep with its reports."""
    evaluate = (str(held_out_file),)
    result = prune_model(gqa_model, rendered=True, method="gram", sparsity=(0.2, 0.4), evaluate=evaluate)
    return Path(result.output)
