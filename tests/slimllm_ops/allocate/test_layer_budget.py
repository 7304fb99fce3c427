"""A budget of whole layers, heads and channels is met by removing what costs least."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from slimllm_ops.allocate.budget import Candidate, spend_by_error
from slimllm_ops.allocate.form import Form
from slimllm_ops.allocate.layer_budget import Spent, layer_candidates, spend_on_layers_too
from slimllm_ops.allocate.layer_ratios import LayerSize
from slimllm_ops.decide.paths import LayerPaths, ModulePath
from slimllm_ops.errors import InputError
from tests.slimllm_ops.allocate.test_budget import BIAS, CHANNEL, UNIT, model, spent

# Norms, which go with a layer and with nothing less.
NORMS = 64
LAYER = 4 * UNIT + 40 * CHANNEL + NORMS
SIZE = LayerSize(
    num_units=4,
    unit_parameters=UNIT,
    num_channels=40,
    channel_parameters=CHANNEL,
    attention_bias_parameters=BIAS,
    mlp_bias_parameters=BIAS,
    parameters=LAYER,
)


def whole(modules: Sequence[Candidate], changes: Sequence[float]) -> list[Candidate]:
    """Return the layers of modules, of which each changes the stream by so much."""
    paths = []
    for (attention, mlp), change in zip(zip(modules[0::2], modules[1::2], strict=True), changes, strict=True):
        module = [ModulePath(one.ranking, one.output_variance) for one in (attention, mlp)]
        paths.append(LayerPaths(*module, attention.stream_power, change))
    return layer_candidates([SIZE] * len(changes), paths)


def removed(modules: Sequence[Candidate], result: Spent) -> int:
    return LAYER * len(result.dropped) + spent(modules, result.units)


def scaled_error(modules: Sequence[Candidate], layers: Sequence[Candidate], result: Spent) -> float:
    errors = [sum(one.ranking.costs[:count]) / one.scale for one, count in zip(modules, result.units, strict=True)]
    return sum(errors) + sum(layers[layer].ranking.costs[0] / layers[layer].scale for layer in result.dropped)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.8])
def test_a_budget_is_met_to_within_a_channel_whatever_goes(seed: int, fraction: float) -> None:
    modules, target = model(seed), int(fraction * 4 * LAYER)
    layers = whole(modules, [3.0, 0.5, 2.0, 1.0])
    result = spend_on_layers_too(layers, modules, target, spend_by_error)
    assert 0 <= target - removed(modules, result) < CHANNEL
    assert len(result.dropped) < 4
    for index, (count, candidate) in enumerate(zip(result.units, modules, strict=True)):
        assert count == 0 if index // 2 in result.dropped else count < candidate.num_units


def test_a_layer_that_changes_nothing_goes_first_and_the_others_stay_whole() -> None:
    modules = model(0)
    layers = whole(modules, [100.0, 100.0, 1e-9, 100.0])
    assert spend_on_layers_too(layers, modules, LAYER, spend_by_error) == Spent((0,) * 8, frozenset({2}))


def test_layers_that_matter_stay_and_the_budget_is_that_of_units_alone() -> None:
    modules, target = model(1), int(0.4 * 4 * LAYER)
    layers = whole(modules, [1e6] * 4)
    expected = Spent(tuple(spend_by_error(modules, target)))
    assert spend_on_layers_too(layers, modules, target, spend_by_error) == expected


@pytest.mark.parametrize("seed", range(6))
def test_no_number_of_the_cheapest_layers_would_have_cost_less(seed: int) -> None:
    modules, target = model(seed), int(0.55 * 4 * LAYER)
    layers = whole(modules, [0.4, 3.0, 0.9, 30.0])
    result = spend_on_layers_too(layers, modules, target, spend_by_error)
    order = sorted(range(4), key=lambda layer: layers[layer].ranking.costs[0] / layers[layer].scale)
    for number in range(3):
        kept = [index for index in range(8) if index // 2 not in order[:number]]
        counts = spend_by_error([modules[index] for index in kept], target - number * LAYER)
        units = tuple(dict(zip(kept, counts, strict=True)).get(index, 0) for index in range(8))
        other = Spent(units, frozenset(order[:number]))
        assert scaled_error(modules, layers, result) <= scaled_error(modules, layers, other)


def test_of_layers_that_change_as_much_the_larger_goes() -> None:
    modules = model(2)
    layers = [replace(one, stream_power=1.0) for one in whole(modules, [1e-9] * 4)]
    layers[3] = replace(layers[3], unit_parameters=2 * LAYER)
    assert spend_on_layers_too(layers, modules, 2 * LAYER, spend_by_error).dropped == {3}


def test_layers_reach_further_than_units_until_one_is_left() -> None:
    # A layer of one head and one channel, with the norms and biases that it has.
    modules, most = model(3), 4 * LAYER - UNIT - CHANNEL - NORMS - 2 * BIAS
    layers = whole(modules, [1e-3, 2e-3, 3e-3, 1e3])
    with pytest.raises(InputError, match="ask for a lower sparsity"):
        spend_by_error(modules, most)
    result = spend_on_layers_too(layers, modules, most, spend_by_error)
    assert result == Spent((0,) * 6 + (3, 39), frozenset({0, 1, 2}))
    with pytest.raises(InputError, match="ask for a lower sparsity"):
        spend_on_layers_too(layers, modules, most + CHANNEL, spend_by_error)


def test_the_layers_that_stay_are_alike_where_that_is_asked() -> None:
    modules = model(4)
    layers = whole(modules, [1e6, 1e-9, 1e6, 1e6])
    spend = partial(Form(uniform=True, multiple_of=4).spend, spend_by_error)
    result = spend_on_layers_too(layers, modules, int(0.5 * 4 * LAYER), spend)
    assert result.dropped == {1}
    assert len({result.units[2 * layer : 2 * layer + 2] for layer in (0, 2, 3)}) == 1
    assert not result.units[1] % 4
    assert result.units[0] or result.units[1]
