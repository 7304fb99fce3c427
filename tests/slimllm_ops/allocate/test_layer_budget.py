"""A budget of whole layers, heads and channels is met by removing what costs least."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from slimllm_ops.allocate.budget import Candidate, spend_by_cost
from slimllm_ops.allocate.form import Form
from slimllm_ops.allocate.layer_budget import Spent, layer_candidates, spend_on_layers_too
from slimllm_ops.allocate.layer_size import LayerSize
from slimllm_ops.decide.paths import LayerPaths, ModulePath
from slimllm_ops.decide.sensitivity import Sensitivity
from slimllm_ops.errors import InputError
from slimllm_ops.models.pair import Pair
from tests.slimllm_ops.allocate.test_budget import BIAS, CHANNEL, UNIT, flat, model, paired, spent

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


# Spends a budget on modules, each in any number of units.
spend = partial(Form().spend, spend_by_cost)


def whole(modules: Sequence[Pair[Candidate]], changes: Sequence[float]) -> list[Candidate]:
    """Return the layers of modules, of which each changes the stream by so much."""
    paths = []
    for module, change in zip(modules, changes, strict=True):
        attention, mlp = module.map(lambda one: ModulePath(one.ranking, one.output_variance))
        paths.append(LayerPaths(attention, mlp, module.attention.stream_power, change))
    # The loss of a change is then the change itself.
    sensitivities = [Sensitivity(Pair(*np.zeros((2, 4, 4))), 2 * 4)] * len(modules)
    return layer_candidates([SIZE] * len(changes), paths, sensitivities)


def removed(modules: Sequence[Pair[Candidate]], result: Spent) -> int:
    return LAYER * len(result.dropped) + spent(flat(modules), flat(result.units))


def scaled_error(modules: Sequence[Pair[Candidate]], layers: Sequence[Candidate], result: Spent) -> float:
    removals = zip(flat(modules), flat(result.units), strict=True)
    errors = [sum(one.ranking.costs[:count]) for one, count in removals]
    return sum(errors) + sum(layers[layer].ranking.costs[0] for layer in result.dropped)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.8])
def test_a_budget_is_met_to_within_a_channel_whatever_goes(seed: int, fraction: float) -> None:
    modules, target = paired(model(seed)), int(fraction * 4 * LAYER)
    layers = whole(modules, [3.0, 0.5, 2.0, 1.0])
    result = spend_on_layers_too(layers, modules, target, spend)
    assert 0 <= target - removed(modules, result) < CHANNEL
    assert len(result.dropped) < 4
    for layer, (counts, pair) in enumerate(zip(result.units, modules, strict=True)):
        for count, candidate in zip(counts, pair, strict=True):
            assert count == 0 if layer in result.dropped else count < candidate.num_units


def test_a_layer_that_changes_nothing_goes_first_and_the_others_stay_whole() -> None:
    modules = paired(model(0))
    layers = whole(modules, [100.0, 100.0, 1e-9, 100.0])
    assert spend_on_layers_too(layers, modules, LAYER, spend) == Spent((Pair(0, 0),) * 4, frozenset({2}))


def test_layers_that_matter_stay_and_the_budget_is_that_of_units_alone() -> None:
    modules, target = paired(model(1)), int(0.4 * 4 * LAYER)
    layers = whole(modules, [1e6] * 4)
    expected = Spent(tuple(paired(spend_by_cost(flat(modules), target))))
    assert spend_on_layers_too(layers, modules, target, spend) == expected


@pytest.mark.parametrize("seed", range(6))
def test_no_number_of_the_cheapest_layers_would_have_cost_less(seed: int) -> None:
    modules, target = paired(model(seed)), int(0.55 * 4 * LAYER)
    layers = whole(modules, [0.4, 3.0, 0.9, 30.0])
    result = spend_on_layers_too(layers, modules, target, spend)
    order = sorted(range(4), key=lambda layer: layers[layer].ranking.costs[0])
    for number in range(3):
        kept = [layer for layer in range(4) if layer not in order[:number]]
        counts = spend([modules[layer] for layer in kept], target - number * LAYER)
        units = tuple(dict(zip(kept, counts, strict=True)).get(layer, Pair(0, 0)) for layer in range(4))
        other = Spent(units, frozenset(order[:number]))
        assert scaled_error(modules, layers, result) <= scaled_error(modules, layers, other)


def test_of_layers_that_change_as_much_the_larger_goes() -> None:
    modules = paired(model(2))
    layers = whole(modules, [1e-9] * 4)
    layers[3] = replace(layers[3], unit_parameters=2 * LAYER)
    assert spend_on_layers_too(layers, modules, 2 * LAYER, spend).dropped == {3}


def test_layers_reach_further_than_units_until_one_is_left() -> None:
    # A layer of one head and one channel, with the norms and biases that it has.
    modules, most = paired(model(3)), 4 * LAYER - UNIT - CHANNEL - NORMS - 2 * BIAS
    layers = whole(modules, [1e-3, 2e-3, 3e-3, 1e3])
    with pytest.raises(InputError, match="ask for a lower sparsity"):
        spend(modules, most)
    result = spend_on_layers_too(layers, modules, most, spend)
    assert result == Spent((*[Pair(0, 0)] * 3, Pair(3, 39)), frozenset({0, 1, 2}))
    with pytest.raises(InputError, match="ask for a lower sparsity"):
        spend_on_layers_too(layers, modules, most + CHANNEL, spend)


def test_the_layers_that_stay_are_alike_where_that_is_asked() -> None:
    modules = paired(model(4))
    layers = whole(modules, [1e6, 1e-9, 1e6, 1e6])
    alike = partial(Form(uniform=True, multiple_of=4).spend, spend_by_cost)
    result = spend_on_layers_too(layers, modules, int(0.5 * 4 * LAYER), alike)
    assert result.dropped == {1}
    first, _, *others = result.units
    assert others == [first, first]
    assert not first.mlp % 4
    assert first.attention or first.mlp
