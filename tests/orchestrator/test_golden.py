"""Whole runs on a real small model match the decisions, values and losses of the authors' published code."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.pipeline import PruneResult
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision, Plan

CASE = "babyllama-mha-0.25"


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / CASE / "decisions.json").read_text())


@pytest.fixture(scope="module")
def values(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden" / CASE / "values.safetensors")


@pytest.fixture(scope="module")
def prune_golden(shared: Path, prune_model: Callable[..., PruneResult]) -> Callable[..., PruneResult]:
    calibration = str(shared / "golden" / "tokens" / "babyllama.calibration.parquet")

    def run(**settings: Any) -> PruneResult:
        return prune_model(shared / "models" / "babyllama-mha", calibration=calibration, workers=2, **settings)

    return run


@pytest.fixture(scope="module")
def by_ratio(shared: Path, prune_golden: Callable[..., PruneResult]) -> PruneResult:
    held_out = str(shared / "golden" / "tokens" / "babyllama.heldout.parquet")
    return prune_golden(ratio=0.25, pruned_layers=4, alpha=10.0, evaluate=(held_out,))


@pytest.fixture(scope="module")
def plan(by_ratio: PruneResult) -> Plan:
    return Plan.read(by_ratio.output / "pruning" / "plan.json")


def test_the_layers_similarities_and_ratios(plan: Plan, recorded: dict[str, Any]) -> None:
    assert [layer.similarity for layer in plan.layers] == pytest.approx(recorded["layer_score"], rel=1e-5)
    ratios = {str(number): layer.ratio for number, layer in enumerate(plan.layers) if layer.ratio}
    assert ratios == pytest.approx(recorded["layer_prune_ratio"], rel=1e-4)


def test_the_kept_heads_and_channels_are_equal(plan: Plan, recorded: dict[str, Any]) -> None:
    decided = {
        str(number): (list(layer.attention.kept), list(layer.mlp.kept))
        for number, layer in enumerate(plan.layers)
        if layer.attention and layer.mlp
    }
    expected = {
        number: (sorted(layer["kept_heads"]), sorted(layer["kept_channels"]))
        for number, layer in recorded["layers"].items()
    }
    assert decided == expected


@pytest.mark.parametrize("module", ["attention", "mlp"])
def test_the_scales_and_biases(plan: Plan, values: dict[str, Tensor], module: str) -> None:
    for number, layer in enumerate(plan.layers):
        decision: Decision | None = getattr(layer, module)
        if decision is None:
            continue
        assert decision.recovery is not None
        for name, found in (("scale", decision.recovery.scale_D), ("bias", decision.recovery.bias_D)):
            expected = values[f"layers.{number}.{module}.{name}"]
            error = float((found - expected).norm() / expected.norm())
            assert error < 1e-4, f"layer {number}, {module}.{name}: {error:.2g}"


def test_the_scores(plan: Plan, values: dict[str, Tensor]) -> None:
    for number, layer in enumerate(plan.layers):
        for module, name in (("attention", "head_score"), ("mlp", "score")):
            decision: Decision | None = getattr(layer, module)
            if decision and decision.recovery:
                found = torch.tensor(decision.scores, dtype=torch.float64)
                if module == "attention":
                    # Recorded is the similarity of the output without the head, summed over its dims.
                    found = (1 - found) * len(decision.recovery.scale_D)
                found = found.float()
                torch.testing.assert_close(found, values[f"layers.{number}.{module}.{name}"], rtol=1e-3, atol=0)


def test_the_parameters_and_the_held_out_loss(by_ratio: PruneResult, recorded: dict[str, Any]) -> None:
    totals = by_ratio.totals
    assert (totals.parameters_before, totals.parameters_after) == (recorded["params_before"], recorded["params_after"])
    ((dense, pruned),) = totals.perplexity.values()
    assert math.log(dense) == pytest.approx(recorded["dense_heldout_loss"], abs=1e-4)
    assert math.log(pruned) == pytest.approx(recorded["pruned_heldout_loss"], abs=1e-4)


def test_the_ratio_is_solved_for_where_a_sparsity_is_asked(
    by_ratio: PruneResult, prune_golden: Callable[..., PruneResult]
) -> None:
    asked = by_ratio.totals.sparsity
    solved = prune_golden(sparsity=asked, pruned_layers=4, alpha=10.0)
    one_channel = 3 * Checkpoint.open(solved.output).config.hidden_size
    assert 0 <= solved.totals.parameters_after - by_ratio.totals.parameters_after < one_channel
