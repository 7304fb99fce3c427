"""Surgery removes whole rows and columns of a layer's tensors, and changes nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.surgery import prune_layer
from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import Branch, layer_shape
from tests.slimllm_ops.naive import flat, kept_columns, random_channels, random_decision

KEPT_CHANNELS = (0, 3, 4, 20, 47)
KINDS = ("weight", "bias")
# Where the projections that are stored as one begin and end, in fractions of the rows: two query heads to a key.
PARTS = {"qkv_proj": ((0, 1 / 2), (1 / 2, 3 / 4), (3 / 4, 1)), "gate_up_proj": ((0, 1 / 2), (1 / 2, 1))}


def pruned(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[dict, dict, list[tuple[Branch, Decision]]]:
    """Return a layer's tensors before and after, and what was decided of its branches."""
    checkpoint = Checkpoint.open(directory)
    shape = layer_shape(checkpoint.config, 0)
    num_units = shape.num_attention_units
    heads = random_decision(0, (1, 3)[: num_units // 2], num_units)
    plan = LayerPlan(attention=heads, mlp=random_channels(1, KEPT_CHANNELS, shape))
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.read_layer(1).items()}
    decisions = ((checkpoint.family.attention, plan.attention), (checkpoint.family.mlp, plan.mlp))
    decided = [(branch, decision) for branch, decision in decisions if decision is not None]
    return tensors, prune_layer(tensors, checkpoint.family, plan), decided


def test_rows_into_a_branch_go_with_their_units(model_dir: Path) -> None:
    before, after, decided = pruned(model_dir)
    for branch, decision in decided:
        names = [f"{name}.{kind}" for name in branch.inputs for kind in ("weight", "bias")]
        for name in branch.input_weights if branch.reading.experts else ():
            # Of every expert, the rows of its gate and those of its projection up.
            for expert, rows in enumerate(np.split(np.array(decision.kept) % 48, len(before[name]))):
                assert torch.equal(after[name][expert], before[name][expert, [*rows, *rows + 48]])
        for name in set(names) & set(before):
            # A unit has an equal share of the rows: its query heads, its key, its value; a channel has one.
            rows, num_rows = [], len(before[name])
            for first, last in PARTS.get(name.split(".")[-2], ((0, 1),)):
                start, size = first * num_rows, (last - first) * num_rows
                rows += [round(start) + row for row in kept_columns(decision, round(size))]
            assert torch.equal(after[name], before[name][rows])


def test_columns_out_of_a_branch_go_and_the_rest_is_scaled(model_dir: Path) -> None:
    before, after, decided = pruned(model_dir)
    for branch, decision in decided:
        expected = scaled(before[branch.output_weight], decision)
        torch.testing.assert_close(flat(after[branch.output_weight]).double(), expected, rtol=1e-6, atol=0)
        if decision.with_bias:
            bias_D = decision.recovery.bias_D + before.get(branch.output_bias, torch.zeros(32))
            torch.testing.assert_close(after[branch.output_bias].double(), bias_D.double(), rtol=1e-6, atol=1e-6)


def scaled(weight: torch.Tensor, decision: Decision) -> torch.Tensor:
    """Return the columns of an output weight that a decision keeps, times its scales, exactly."""
    weight_DP = flat(weight)
    scale_DE = torch.atleast_2d(decision.recovery.scale_D).T
    scale_DP = scale_DE.repeat_interleave(weight_DP.shape[1] // scale_DE.shape[1], dim=1)
    return (weight_DP.double() * scale_DP)[:, kept_columns(decision, weight_DP.shape[1])]


def test_all_else_stays(model_dir: Path) -> None:
    before, after, decided = pruned(model_dir)
    touched = {f"{name}.{kind}" for one, _ in decided for name in (*one.inputs, one.output) for kind in KINDS}
    touched |= {name for one, _ in decided for name in (*one.input_weights, one.output_weight)}
    assert set(before) - touched
    for name in set(before) - touched:
        assert torch.equal(after[name], before[name])
    assert set(after) == set(before) | {branch.output_bias for branch, decision in decided if decision.with_bias}


def test_a_refit_takes_the_place_of_the_kept_columns(biased_model: Path) -> None:
    checkpoint = Checkpoint.open(biased_model)
    tensors = checkpoint.read_layer(0)
    weight_SD, bias_D = torch.randn(5, 32), torch.randn(32)
    decision = Decision(KEPT_CHANNELS, (0.0,) * 48, Refit(weight_SD, bias_D, 0.5), relative_error=0.5)
    after = prune_layer(tensors, checkpoint.family, LayerPlan(mlp=decision))
    assert torch.equal(after["mlp.down_proj.weight"], weight_SD.T)
    torch.testing.assert_close(after["mlp.down_proj.bias"], bias_D + tensors["mlp.down_proj.bias"])
    assert torch.equal(after["mlp.up_proj.weight"], tensors["mlp.up_proj.weight"][list(KEPT_CHANNELS)])


def test_a_decision_without_the_weights_of_its_refit_is_an_error(mha_model: Path) -> None:
    checkpoint = Checkpoint.open(mha_model)
    decision = Decision(KEPT_CHANNELS, (0.0,) * 48, None, relative_error=0.5)
    with pytest.raises(ValueError, match="the weights of its refit are in the checkpoint"):
        prune_layer(checkpoint.read_layer(0), checkpoint.family, LayerPlan(mlp=decision))


def test_an_empty_plan_changes_nothing(mha_model: Path) -> None:
    checkpoint = Checkpoint.open(mha_model)
    tensors = checkpoint.read_layer(0)
    assert prune_layer(tensors, checkpoint.family, LayerPlan()) == tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_recovery_is_rounded_once_to_the_dtype_of_the_source(model_dir: Path, dtype: torch.dtype) -> None:
    before, after, decided = pruned(model_dir, dtype)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    for branch, decision in decided:
        exact = scaled(before[branch.output_weight], decision)
        # Half a unit in the last place, and float32's own rounding before it.
        torch.testing.assert_close(
            flat(after[branch.output_weight]).double(), exact, rtol=0.5001 * torch.finfo(dtype).eps, atol=1e-7
        )


@pytest.mark.parametrize(("weight", "bias", "named"), [(1e5, 0.0, "weight"), (0.0, -1e5, "bias")])
def test_what_the_dtype_cannot_hold_is_an_error(mha_model: Path, weight: float, bias: float, named: str) -> None:
    """Of a projection from inputs that hardly vary, a recovery may be as large as float16 does not reach."""
    checkpoint = Checkpoint.open(mha_model)
    tensors = {name: tensor.half() for name, tensor in checkpoint.read_layer(0).items()}
    recovery = Refit(torch.full((5, 32), weight), torch.full((32,), bias), 0.5)
    plan = LayerPlan(mlp=Decision(KEPT_CHANNELS, (0.0,) * 48, recovery, relative_error=0.5))
    with pytest.raises(NonFiniteError, match=rf"mlp\.down_proj\.{named} reaches 1e\+05, which torch.float16 cannot"):
        prune_layer(tensors, checkpoint.family, plan)
