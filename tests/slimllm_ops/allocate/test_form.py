"""A budget with a form: equal layers, channels in steps, no biases."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimllm_ops.allocate.budget import Candidate, spend_by_cost
from slimllm_ops.allocate.form import Form
from slimllm_ops.allocate.layer_ratios import budget_by_sparsity
from slimllm_ops.allocate.layer_size import LayerSize, measure_layer
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.least_squares import Refit, refit
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import InputError
from slimllm_ops.methods import METHODS
from slimllm_ops.models.pair import Pair
from slimllm_ops.module_solves import decide_module
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking
from tests.slimllm_ops.allocate.test_budget import flat, paired
from tests.slimllm_ops.naive import observe, random_activations, random_decision

UNIT, CHANNEL, BIAS = 640, 48, 16


def candidates(layers: int = 4, heads: int = 4, channels: int = 40) -> list[Pair[Candidate]]:
    rng = np.random.default_rng(0)
    made = []
    for layer in range(layers):
        for units, parameters in ((heads, UNIT), (channels, CHANNEL)):
            costs = np.sort(rng.gamma(1.0, 10.0 ** rng.normal(), size=units))
            ranking = Ranking(tuple(rng.permutation(units).tolist()), tuple(costs.tolist()))
            made.append(Candidate(layer=layer, ranking=ranking, unit_parameters=parameters, bias_parameters=BIAS,
                                  output_variance=float(costs.sum()), stream_power=1.0))  # fmt: skip
    return paired(made)


def removed_parameters(spent: Sequence[int]) -> int:
    sizes = (UNIT, CHANNEL) * (len(spent) // 2)
    return sum(count * size - BIAS * (count > 0) for count, size in zip(spent, sizes, strict=True))


@pytest.mark.parametrize("multiple_of", [1, 2])
@pytest.mark.parametrize("uniform", [False, True])
def test_experts_give_as_many_channels_each(multiple_of: int, uniform: bool) -> None:
    given = [Pair(one.attention, replace(one.mlp, units_at_once=4)) for one in candidates()]
    spent = flat(Form(uniform=uniform, multiple_of=multiple_of).spend(spend_by_cost, given, 6000))
    assert all(count % (4 * multiple_of) == 0 for count in spent[1::2])
    assert 0 <= 6000 - removed_parameters(spent) < 4 * multiple_of * CHANNEL * (4 if uniform else 1)


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.6])
def test_a_budget_is_met_to_within_one_step(multiple_of: int, uniform: bool, fraction: float) -> None:
    given = candidates()
    target = int(fraction * sum(one.num_units * one.unit_parameters for one in flat(given)))
    spent = flat(Form(uniform=uniform, multiple_of=multiple_of).spend(spend_by_cost, given, target))
    step = CHANNEL * multiple_of * (4 if uniform else 1)
    assert 0 <= target - removed_parameters(spent) < step + 4 * BIAS
    assert not any((40 - channels) % multiple_of for channels in spent[1::2])
    assert all(channels < 40 and heads < 4 for heads, channels in zip(spent[::2], spent[1::2], strict=True))
    if uniform:
        assert len(set(spent[::2])) == len(set(spent[1::2])) == 1


def test_a_free_form_spends_as_the_rule_does() -> None:
    given = candidates()
    assert flat(Form().spend(spend_by_cost, given, 5000)) == spend_by_cost(flat(given), 5000)


def test_a_uniform_budget_takes_the_kind_of_unit_that_costs_least_over_all_layers() -> None:
    free = [Ranking((0, 1), (0.0, 0.0)), Ranking((0, 1, 2, 3), (9.0, 9.0, 9.0, 9.0))]
    given = [
        Candidate(
            layer=layer,
            ranking=ranking,
            unit_parameters=10,
            bias_parameters=0,
            output_variance=1.0,
            stream_power=1.0,
        )
        for layer in range(2)
        for ranking in free
    ]
    assert Form(uniform=True).spend(spend_by_cost, paired(given), 20) == [Pair(1, 0)] * 2


def sizes(layers: int = 4, channels: int = 40) -> list[LayerSize]:
    return [LayerSize(num_units=4, unit_parameters=UNIT, num_channels=channels, channel_parameters=CHANNEL,
                      attention_bias_parameters=BIAS, mlp_bias_parameters=BIAS, parameters=5000)] * layers  # fmt: skip


@pytest.mark.parametrize("uniform", [False, True])
def test_the_papers_budget_keeps_multiples_and_alike_layers(uniform: bool) -> None:
    form = Form(uniform=uniform, multiple_of=8)
    seen, similarities = form.sizes(sizes()), [0.9, 0.8, 0.95, 0.7]
    budget = budget_by_sparsity(
        seen, similarities[: len(seen)], sparsity=0.3, num_pruned=1 if uniform else 3, alpha=8.0
    )
    layers = form.layers(budget.layers, 4)
    assert len(layers) == 4
    assert not any((40 - one.channels) % 8 for one in layers)
    removed = sum(size.removed_parameters(one.units, one.channels) for size, one in zip(sizes(), layers, strict=True))
    assert 0 <= 0.3 * 20000 - removed < CHANNEL * 8 * (4 if uniform else 1) + 4 * BIAS
    if uniform:
        assert len(set(layers)) == 1


def test_channels_that_make_no_whole_steps_are_an_error() -> None:
    with pytest.raises(InputError, match=r"layer 0 has 40 channels, which is not a multiple of 16: pass --multiple-of"):
        Form(multiple_of=16).sizes(sizes())


def test_layers_that_differ_cannot_be_made_alike() -> None:
    with pytest.raises(InputError, match=r"layer 1 and layer 0 have different numbers .*: --uniform needs a model"):
        Form(uniform=True).sizes([*sizes(1), *sizes(1, channels=36)])


def test_without_biases_a_layer_gives_all_that_its_units_hold(mha_model: Path) -> None:
    checkpoint = Checkpoint.open(mha_model)
    assert (
        measure_layer(checkpoint, 0).removed_parameters(1, 1)
        == measure_layer(checkpoint, 0, with_bias=False).removed_parameters(1, 1) - 2 * 32
    )


def test_the_refit_without_a_bias_is_ridge_regression_of_what_is_not_centred() -> None:
    x_NP, weight_PD = random_activations(0)
    weight_DP = torch.from_numpy(weight_PD.T)
    ranking = Ranking(tuple(range(24)), tuple(float(cost) for cost in range(24)))
    observed = observe(torch.from_numpy(x_NP)).with_intercept(False)
    (decision,) = decide_module(weight_DP, observed, METHODS["gram"], ranking, [9])
    assert isinstance(decision.recovery, Refit)
    assert not decision.with_bias
    assert not decision.recovery.bias_D.any()
    second = x_NP.T @ x_NP / len(x_NP)
    kept = list(range(9, 24))
    regular = second[np.ix_(kept, kept)] + 0.01 * np.diag(second).mean() * np.eye(15)
    expected = weight_PD[kept] + np.linalg.solve(regular, second[np.ix_(kept, range(9))] @ weight_PD[:9])
    np.testing.assert_allclose(decision.recovery.weight_SD, expected, rtol=1e-4, atol=1e-5)


def test_a_decision_without_a_bias_writes_none(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source, directory = make_model(), tmp_path / "pruned"
    writer = CheckpointWriter(Checkpoint.open(source), directory)
    with_bias = random_decision(0, range(20), 48)
    decision = Decision(with_bias.kept, with_bias.scores, with_bias.recovery, 0.5, with_bias=False)
    plans = [LayerPlan(mlp=with_bias), LayerPlan(mlp=decision), LayerPlan()]
    for layer, plan in enumerate(plans):
        writer.write_layer(layer, plan)
    # As a run does that is resumed: plans are read from what was recorded.
    writer.finish([LayerPlan.parse(plan.describe()) for plan in plans])
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.mlp_output_bias_per_layer == [True, False, False]
    assert model.model.layers[1].mlp.down_proj.bias is None


def test_moments_about_zero_have_fits_without_an_intercept() -> None:
    x_NP, weight_PD = random_activations(1)
    observed = observe(torch.from_numpy(x_NP)).with_intercept(False).unpack(torch.device("cpu"))
    projection = Projection.of(observed.moments, torch.from_numpy(weight_PD.T))
    assert not refit(projection, torch.arange(5)).bias_D.any()
    np.testing.assert_allclose(projection.covariance_PP, x_NP.T @ x_NP / len(x_NP), rtol=1e-9)
