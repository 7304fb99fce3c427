"""Plans are values: they are written and read back without loss, and give the rows to keep."""

import json
from pathlib import Path

import pytest
import torch

from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.plan import Decision, LayerPlan, Plan
from slimllm_ops.decide.recovery import Line
from tests.slimllm_ops.naive import random_decision


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    attention = random_decision(0, (0, 2), 3)
    mlp = random_decision(1, (1,), 2)
    layers = (
        LayerPlan(attention=attention, similarity=0.1, ratio=0.2),
        LayerPlan(similarity=2 / 3, ratio=0.0),
        LayerPlan(mlp=mlp),
        LayerPlan(relative_change=1e-3, dropped=True),
    )
    plan = Plan({"method": "slimllm", "model": {"digest": "abc"}}, layers)
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")

    assert again.header == plan.header
    assert [(layer.similarity, layer.ratio) for layer in again.layers[:3]] == [(0.1, 0.2), (2 / 3, 0.0), (None, None)]
    assert (again.layers[1], again.layers[3]) == (layers[1], layers[3])
    assert again.layers[0].mlp is None
    assert again.layers[2].attention is None
    for found, expected in ((again.layers[0].attention, attention), (again.layers[2].mlp, mlp)):
        assert found is not None
        assert (found.kept, found.scores) == (expected.kept, expected.scores)
        assert found.relative_error == expected.relative_error
        assert torch.equal(found.recovery.scale_D, expected.recovery.scale_D)
        assert torch.equal(found.recovery.bias_D, expected.recovery.bias_D)


def test_a_plan_is_plain_json(tmp_path: Path) -> None:
    decision = Decision((0, 2), (1.0, 2.0, 3.0), Line(torch.ones(2), torch.zeros(2), 0.5), relative_error=0.5)
    Plan({"method": "slimllm"}, (LayerPlan(attention=decision, similarity=0.9, ratio=0.3),)).write(
        tmp_path / "plan.json"
    )
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "method": "slimllm",
        "layers": [
            {
                "similarity": 0.9,
                "ratio": 0.3,
                "relative_change": None,
                "dropped": False,
                "attention": {
                    "kept": [0, 2],
                    "scores": [1.0, 2.0, 3.0],
                    "relative_error": 0.5,
                    "with_bias": True,
                    "scale": [1.0, 1.0],
                    "bias": [0.0, 0.0],
                },
                "mlp": None,
            }
        ],
    }


def test_the_weights_of_a_refit_are_the_checkpoints_and_not_the_plans(tmp_path: Path) -> None:
    decision = Decision((0, 2), (1.0, 2.0, 3.0), Refit(torch.ones(2, 4), torch.ones(4), 0.5), relative_error=0.5)
    Plan({}, (LayerPlan(mlp=decision),)).write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json").layers[0].mlp
    assert again == Decision((0, 2), (1.0, 2.0, 3.0), None, relative_error=0.5)


def test_a_decision_counts_its_units() -> None:
    decision = random_decision(0, (0, 3), 5)
    assert (decision.num_units, decision.num_removed) == (5, 3)


@pytest.mark.parametrize(
    ("num_rows", "rows"), [(4, [1, 3]), (8, [2, 3, 6, 7]), (12, [3, 4, 5, 9, 10, 11])], ids=["1", "2", "3"]
)
def test_each_units_rows_lie_side_by_side(num_rows: int, rows: list[int]) -> None:
    assert random_decision(0, (1, 3), 4).kept_rows(num_rows).tolist() == rows
