"""Layer ratios match the paper's formula, meet the target to within a channel, and make up for layers at a bound."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from slimllm_ops.allocate.layer_ratios import (
    Budget,
    budget_by_ratio,
    budget_by_sparsity,
    layer_weights,
    published_settings,
)
from slimllm_ops.allocate.layer_size import LayerSize
from slimllm_ops.allocate.reachable import require_reachable
from slimllm_ops.errors import InputError


def size_of(hidden: int, heads: int, kv_heads: int, head_dim: int, channels: int, has_bias: bool = False) -> LayerSize:
    """Count the parameters of a layer whose output projections have a bias, or get one when pruned."""
    unit = (2 * heads // kv_heads + 2) * head_dim * hidden
    return LayerSize(
        num_units=kv_heads,
        unit_parameters=unit,
        num_channels=channels,
        channel_parameters=3 * hidden,
        attention_bias_parameters=0 if has_bias else hidden,
        mlp_bias_parameters=0 if has_bias else hidden,
        parameters=kv_heads * unit + channels * 3 * hidden + 2 * hidden * (1 + has_bias),
    )


SIZES = {
    "mha": size_of(32, 8, 8, 4, 96),
    "gqa": size_of(32, 8, 2, 4, 96),
    "mqa": size_of(32, 8, 1, 4, 96),
    "biased": size_of(32, 8, 8, 4, 96, has_bias=True),
    "llama-7b": size_of(4096, 32, 32, 128, 11008),
    "llama-3-8b": size_of(4096, 32, 8, 128, 14336),
}


def removed(sizes: Sequence[LayerSize], budget: Budget) -> int:
    total = 0
    for size, layer in zip(sizes, budget.layers, strict=True):
        total += layer.units * size.unit_parameters + layer.channels * size.channel_parameters
        total -= size.attention_bias_parameters if layer.units else 0
        total -= size.mlp_bias_parameters if layer.channels else 0
    return total


def most(sizes: Sequence[LayerSize]) -> int:
    """Return what goes when one unit and one channel stay in each layer."""
    whole = sum(size.parameters for size in sizes)
    left = 0
    for size in sizes:
        grown = size.attention_bias_parameters * (size.num_units > 1) + size.mlp_bias_parameters
        fixed = size.parameters - size.num_units * size.unit_parameters - size.num_channels * size.channel_parameters
        left += size.unit_parameters + size.channel_parameters + grown + fixed
    return whole - left


def random_similarities(seed: int, num_layers: int) -> list[float]:
    return np.random.default_rng(seed).uniform(0.3, 0.99, size=num_layers).tolist()


# Settings and weights.


@pytest.mark.parametrize(
    ("sparsity", "num_pruned", "alpha"),
    [(0.2, 26, 10), (0.5, 30, 7), (0.0, 26, 10), (0.1, 26, 10), (0.6, 30, 7), (0.9, 30, 7), (0.35, 28, 8.5)],
)
def test_published_settings_lie_on_a_line_between_the_published_points(
    sparsity: float, num_pruned: int, alpha: float
) -> None:
    found_pruned, found_alpha = published_settings(sparsity, 32)
    assert found_pruned == num_pruned
    assert found_alpha == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 12, 80])
def test_published_settings_prune_at_least_one_layer_and_none_that_is_not_there(num_layers: int) -> None:
    assert 1 <= published_settings(0.2, num_layers)[0] <= num_layers
    assert published_settings(0.2, num_layers)[0] == max(1, round(0.81 * num_layers))


def test_weights_are_a_softmax_over_the_most_similar_layers() -> None:
    weights = layer_weights([0.5, 0.9, 0.7, 0.8], 3, 2.0)
    terms = {layer: math.exp(2.0 * value) for layer, value in {1: 0.9, 3: 0.8, 2: 0.7}.items()}
    assert list(weights) == [1, 3, 2]
    assert weights == pytest.approx({layer: 3 * term / sum(terms.values()) for layer, term in terms.items()})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_layers", "num_pruned", "alpha"), [(1, 1, 10), (8, 5, 0), (8, 8, 30), (32, 26, 10)])
def test_weights_sum_to_the_number_of_pruned_layers(seed: int, num_layers: int, num_pruned: int, alpha: float) -> None:
    weights = layer_weights(random_similarities(seed, num_layers), num_pruned, alpha)
    assert len(weights) == num_pruned
    assert sum(weights.values()) == pytest.approx(num_pruned, rel=1e-12)


# The paper's own knobs.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mha", "gqa", "llama-7b"])
def test_where_nothing_binds_the_ratio_is_rounded_layer_by_layer(name: str, seed: int) -> None:
    similarities = random_similarities(seed, 12)
    budget = budget_by_ratio([SIZES[name]] * 12, similarities, ratio=0.25, num_pruned=9, alpha=1.0)
    weights = layer_weights(similarities, 9, 1.0)
    for index, layer in enumerate(budget.layers):
        ratio = 0.25 * weights.get(index, 0.0)
        assert layer.ratio == pytest.approx(ratio, rel=1e-12)
        assert (layer.units, layer.channels) == (
            round(ratio * SIZES[name].num_units),
            round(ratio * SIZES[name].num_channels),
        )
    assert budget.note == ""


@pytest.mark.parametrize(("heads", "ratio", "units"), [(10, 0.25, 2), (10, 0.35, 4), (6, 0.25, 2), (2, 0.25, 0)])
def test_counts_that_lie_in_the_middle_are_rounded_to_even(heads: int, ratio: float, units: int) -> None:
    # 2.5 -> 2, 3.5 -> 4, 1.5 -> 2, .5 -> 0; one layer has weight 1.
    budget = budget_by_ratio([size_of(32, heads, heads, 4, 96)], [0.9], ratio=ratio, num_pruned=1, alpha=10)
    assert (budget.layers[0].units, budget.layers[0].channels) == (units, round(ratio * 96))
    assert budget.note == ""


@pytest.mark.parametrize("name", ["mha", "gqa", "llama-7b"])
def test_what_a_layer_cannot_give_is_given_by_the_others(name: str) -> None:
    size, similarities = SIZES[name], [0.99, 0.8, 0.7, 0.6]
    weights = layer_weights(similarities, 4, 10.0)
    assert 0.5 * weights[0] > 1
    budget = budget_by_ratio([size] * 4, similarities, ratio=0.5, num_pruned=4, alpha=10.0)
    asked = sum(
        size.unit_parameters * round(0.5 * weight * size.num_units)
        + size.channel_parameters * round(0.5 * weight * size.num_channels)
        for weight in weights.values()
    )
    given = sum(
        size.unit_parameters * layer.units + size.channel_parameters * layer.channels for layer in budget.layers
    )
    # Biases that open when a further layer is pruned are on top.
    assert 0 <= asked - given + 8 * size.mlp_bias_parameters < size.channel_parameters + 16 * size.mlp_bias_parameters
    assert (budget.layers[0].units, budget.layers[0].channels) == (size.num_units - 1, size.num_channels - 1)
    assert "others give it" in budget.note


def test_a_ratio_that_the_layers_do_not_have_is_an_error() -> None:
    with pytest.raises(InputError, match=r"ratio 1 over 2 layers .* lower --ratio or raise --pruned-layers"):
        budget_by_ratio([SIZES["mha"]] * 4, [0.9, 0.8, 0.7, 0.6], ratio=1.0, num_pruned=2, alpha=30.0)


# A target for all layers.


@pytest.mark.parametrize("num_layers", [1, 4, 12])
@pytest.mark.parametrize("alpha", [0.0, 7.0, 30.0, 300.0])
@pytest.mark.parametrize("name", SIZES)
def test_a_sparsity_is_met_to_within_one_channel_below(name: str, alpha: float, num_layers: int) -> None:
    sizes = [SIZES[name]] * num_layers
    whole = sum(size.parameters for size in sizes)
    for seed, fraction in enumerate((0.03, 0.2, 0.41, 0.6, 0.8, 0.97)):
        sparsity = fraction * most(sizes) / whole
        budget = budget_by_sparsity(
            sizes,
            random_similarities(seed, num_layers),
            sparsity=sparsity,
            num_pruned=max(1, num_layers * 3 // 4),
            alpha=alpha,
        )
        missing = sparsity * whole - removed(sizes, budget)
        assert -1e-3 <= missing < SIZES[name].channel_parameters + 1, (fraction, budget)
        assert all(0 <= layer.units < SIZES[name].num_units for layer in budget.layers)
        assert all(0 <= layer.channels < SIZES[name].num_channels for layer in budget.layers)


@pytest.mark.parametrize("alpha", [0.0, 10.0, 60.0, 100.0, 300.0])
def test_a_sparsity_is_met_by_the_papers_formula(alpha: float) -> None:
    similarities = random_similarities(1, 12)
    budget = budget_by_sparsity([SIZES["llama-7b"]] * 12, similarities, sparsity=0.3, num_pruned=12, alpha=alpha)
    weights = layer_weights(similarities, 12, alpha)
    ratio = max(layer.ratio / weights[index] for index, layer in enumerate(budget.layers))
    assert ratio > 0
    for index, layer in enumerate(budget.layers):
        assert layer.ratio == pytest.approx(ratio * weights[index], rel=1e-9)
        # What rounding leaves is spread over all layers: less than a head's worth of channels.
        assert layer.channels - min(round(layer.ratio * 11008), 11007) <= 4 * 128 / 3 + 1
        assert layer.units - min(round(layer.ratio * 32), 31) in (0, 1)


def test_where_layers_would_lose_a_unit_all_at_once_as_many_do_as_the_target_allows() -> None:
    size, jumps = SIZES["mha"], 0
    for sparsity in np.linspace(0.1, 0.8, 50):
        layers = budget_by_sparsity([size] * 4, [0.9] * 4, sparsity=sparsity, num_pruned=4, alpha=1.0).layers
        # Channels make up for less than one unit: in total, beyond what the formula rounds to.
        extra = sum(layer.channels - round(layer.ratio * size.num_channels) for layer in layers)
        assert extra * size.channel_parameters < size.unit_parameters + 4 * size.channel_parameters
        jumps += len({layer.units for layer in layers}) > 1
    assert jumps


def test_layers_may_differ_in_size() -> None:
    sizes = [SIZES["mha"], size_of(32, 3, 3, 4, 40), size_of(32, 8, 8, 4, 11), SIZES["gqa"]]
    whole = sum(size.parameters for size in sizes)
    budget = budget_by_sparsity(sizes, [0.7, 0.9, 0.8, 0.6], sparsity=0.4, num_pruned=4, alpha=5.0)
    assert 0 <= 0.4 * whole - removed(sizes, budget) < 97


def test_more_layers_are_pruned_where_the_asked_ones_cannot_give_so_much() -> None:
    budget = budget_by_sparsity([SIZES["mha"]] * 4, [0.9, 0.8, 0.7, 0.6], sparsity=0.5, num_pruned=1, alpha=5.0)
    assert [layer.ratio > 0 for layer in budget.layers] == [True, True, True, False]
    assert budget.note == "1 layers are not enough: 3 are pruned"


def test_more_layers_are_pruned_where_the_asked_ones_have_no_channel_left_to_make_it_exact() -> None:
    """As in a model that was pruned before: layers with heads and one channel, others with channels and one head."""
    heads, channels = size_of(32, 8, 8, 4, 1, has_bias=True), size_of(32, 1, 1, 4, 96, has_bias=True)
    sizes = [channels, heads, heads]
    whole = sum(size.parameters for size in sizes)
    target = 1.5 * heads.unit_parameters
    budget = budget_by_sparsity(sizes, [0.6, 0.9, 0.8], sparsity=target / whole, num_pruned=1, alpha=5.0)
    assert 0 <= target - removed(sizes, budget) < channels.channel_parameters
    assert budget.note == "1 layers are not enough: 3 are pruned"


def test_where_no_channel_is_left_heads_are_removed_as_far_as_they_go() -> None:
    size = size_of(32, 8, 8, 4, 1, has_bias=True)
    budget = budget_by_sparsity(
        [size] * 3,
        [0.6, 0.9, 0.8],
        sparsity=2.5 * size.unit_parameters / (3 * size.parameters),
        num_pruned=1,
        alpha=5.0,
    )
    assert [layer.units for layer in budget.layers] == [0, 2, 0]
    assert budget.note == ""


@pytest.mark.parametrize("seed", range(40))
def test_whatever_layers_have_left_a_sparsity_is_met_to_within_the_smallest_unit_that_can_go(seed: int) -> None:
    rng = random.Random(seed)
    shapes = [(rng.choice([1, 1, 2, 8]), rng.choice([1, 1, 3, 40])) for _ in range(5)]
    sizes = [size_of(32, heads, heads, 4, channels, has_bias=True) for heads, channels in shapes]
    target = int(rng.uniform(0.2, 0.9) * most(sizes))
    sparsity = (target + 0.5) / sum(size.parameters for size in sizes)
    budget = budget_by_sparsity(sizes, random_similarities(seed, 5), sparsity=sparsity, num_pruned=3, alpha=8.0)
    given = list(zip(sizes, budget.layers, strict=True))
    left = [size.unit_parameters for size, layer in given if layer.units < size.num_units - 1]
    left += [size.channel_parameters for size, layer in given if layer.channels < size.num_channels - 1]
    assert 0 <= target - removed(sizes, budget) < min(left, default=math.inf)


def test_layers_beyond_the_most_similar_are_left_whole() -> None:
    budget = budget_by_sparsity([SIZES["mha"]] * 4, [0.6, 0.9, 0.7, 0.8], sparsity=0.2, num_pruned=2, alpha=5.0)
    assert [(layer.units > 0, layer.channels > 0) for layer in budget.layers] == [
        (False, False),
        (True, True),
        (False, False),
        (True, True),
    ]
    assert budget.note == ""


@pytest.mark.parametrize("name", SIZES)
def test_a_sparsity_beyond_reach_is_an_error_that_says_what_is_in_reach(name: str) -> None:
    sizes = [SIZES[name]] * 3
    reachable = most(sizes) / sum(size.parameters for size in sizes)
    named = math.floor(1000 * reachable) / 1000

    def ask(sparsity: float) -> Budget:
        return budget_by_sparsity(sizes, [0.9, 0.8, 0.7], sparsity=sparsity, num_pruned=1, alpha=5.0)

    with pytest.raises(InputError, match=rf"sparsity .* is not reachable: .* it is {named:.3f}; ask for less"):
        ask(min(reachable + 1e-3, 1.0))
    with pytest.raises(InputError, match=rf"it is {named:.3f}; ask for less"):
        require_reachable(sizes, min(reachable + 1e-3, 1.0))
    require_reachable(sizes, reachable - 1e-9)
    require_reachable(sizes, named)
    channel = min(size.removed_parameters(0, 1) for size in sizes) / sum(size.parameters for size in sizes)
    with pytest.raises(InputError, match=r"removes nothing: the smallest head .* ask for at least that"):
        require_reachable(sizes, 0.9 * channel)
    require_reachable(sizes, math.ceil(1e6 * channel) / 1e6)
    budget = ask(reachable - 1e-9)
    assert all(layer.units == SIZES[name].num_units - 1 for layer in budget.layers)
