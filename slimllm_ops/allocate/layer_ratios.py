r"""Allocates by SlimLLM's layer ratios (paper, section 3.5), adjusted to meet a parameter budget.

s_l is the mean cosine between the input and the output of decoder layer l. Over the n layers with the highest s,

    w = n softmax(alpha s),      ratio_l = ratio w_l

and layer l loses round(ratio_l H) heads and round(ratio_l P) channels.

The published code does not bound ratio_l and fails if a layer would lose every head. Here every layer keeps at least
one KV group and one channel, and the other layers make up the difference. Layers that must stay whole are not among
the n. If all layers must keep as many heads, they lose round(ratio w H), where w is the mean of w_l over all layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from slimllm_ops.allocate.gap import close_gap
from slimllm_ops.allocate.layer_size import LayerSize, parameters_to_remove
from slimllm_ops.allocate.reachable import unreachable
from slimllm_ops.errors import InputError

# (sparsity, fraction of the layers that is pruned, alpha), as published for LLaMA-7B.
PUBLISHED = ((0.20, 0.81, 10.0), (0.50, 0.94, 7.0))


@dataclass(frozen=True)
class LayerBudget:
    """One layer's budget: its ratio by the paper's formula, and the numbers of units and channels to remove."""

    ratio: float
    units: int
    channels: int


@dataclass(frozen=True)
class Budget:
    """The budget of every layer, and a note if the paper's formula could not be followed exactly."""

    layers: tuple[LayerBudget, ...]
    note: str = ""


def published_settings(sparsity: float, num_layers: int) -> tuple[int, float]:
    """Return (pruned layers, alpha) for a sparsity: linear between the two published settings, constant outside."""
    (low, low_fraction, low_alpha), (high, high_fraction, high_alpha) = PUBLISHED
    position = min(max((sparsity - low) / (high - low), 0.0), 1.0)
    fraction = low_fraction + position * (high_fraction - low_fraction)
    return max(1, round(fraction * num_layers)), low_alpha + position * (high_alpha - low_alpha)


def layer_weights(similarities: Sequence[float], num_pruned: int, alpha: float) -> dict[int, float]:
    """Return w_l = n softmax(alpha s)_l of the n most similar layers, in descending order of similarity."""
    chosen = sorted(range(len(similarities)), key=lambda layer: -similarities[layer])[:num_pruned]
    scores = torch.tensor([similarities[layer] for layer in chosen], dtype=torch.float64)
    weights = num_pruned * torch.softmax(alpha * scores, dim=0)
    return dict(zip(chosen, weights.tolist(), strict=True))


def prunable(sizes: Sequence[LayerSize]) -> list[int]:
    """Return the layers that may lose anything."""
    return [layer for layer, size in enumerate(sizes) if size.limit > 0 and size.num_channels]


def _weights(
    sizes: Sequence[LayerSize], similarities: Sequence[float], num_pruned: int, alpha: float
) -> dict[int, float]:
    """Return the weight of each of the n most similar layers that may lose anything, and of heads that are alike."""
    layers = prunable(sizes)
    weights = layer_weights([similarities[layer] for layer in layers], num_pruned, alpha)
    mean = sum(weights.values()) / len(similarities)
    alike = {index: mean for index, size in enumerate(sizes) if not size.num_channels}
    return {layers[index]: weight for index, weight in weights.items()} | alike


def budget_by_ratio(
    sizes: Sequence[LayerSize], similarities: Sequence[float], *, ratio: float, num_pruned: int, alpha: float
) -> Budget:
    """Allocate by the paper's own settings; if a layer cannot give its share, the others give it instead."""
    weights = _weights(sizes, similarities, num_pruned, alpha)
    asked = sum(
        sizes[layer].unit_parameters * round(ratio * weight * sizes[layer].num_units)
        + sizes[layer].channel_parameters * round(ratio * weight * sizes[layer].num_channels)
        for layer, weight in weights.items()
    )
    layers = _round_ratio(sizes, weights, ratio)
    given = sum(
        size.unit_parameters * layer.units + size.channel_parameters * layer.channels
        for size, layer in zip(sizes, layers, strict=True)
    )
    if given == asked:
        return Budget(layers)
    target = _removed(sizes, layers) + asked - given
    met = _meet(sizes, weights, target)
    if met is None:
        raise InputError(
            f"ratio {ratio:g} over {num_pruned} layers (alpha {alpha:g}) asks for {asked:,} parameters, more than "
            f"these layers may lose: lower --ratio or raise --pruned-layers"
        )
    return Budget(met, "some layers cannot give their share and keep what they must: others give it")


def budget_by_sparsity(
    sizes: Sequence[LayerSize],
    similarities: Sequence[float],
    *,
    sparsity: float,
    num_pruned: int,
    alpha: float,
) -> Budget:
    """Find the ratio that removes `sparsity` of the layers' parameters, then fill the gap with channels.

    The result is at most one channel below the target, as long as there are channels left to remove. If `num_pruned`
    layers cannot meet the target, more layers are pruned, and the note says so.

    Raises:
        InputError: All layers together cannot meet the target with what must stay in each.
    """
    target = parameters_to_remove(sizes, sparsity)
    channel = min(size.channel_parameters for size in sizes if size.num_channels)
    nearest, least_missing = None, math.inf
    for pruned in range(num_pruned, len(prunable(sizes)) + 1):
        layers = _meet(sizes, _weights(sizes, similarities, pruned, alpha), target)
        # The layers pruned so far may have no channel left to fill the gap; the next layer may have some.
        if layers is not None and (missing := target - _removed(sizes, layers)) < least_missing:
            note = f"{num_pruned} layers are not enough: {pruned} are pruned" if pruned > num_pruned else ""
            nearest, least_missing = Budget(layers, note), missing
        if least_missing < channel:
            break
    if nearest is None:
        raise unreachable(sizes, sparsity)
    return nearest


def _meet(sizes: Sequence[LayerSize], weights: dict[int, float], target: int) -> tuple[LayerBudget, ...] | None:
    """Return the budget nearest below `target` removed parameters, or None if these layers cannot give as much."""
    # At this ratio, every pruned layer has one unit and one channel left.
    low, high = 0.0, 1.0 / max(min(weights.values()), 1e-300)
    if _removed(sizes, _round_ratio(sizes, weights, high)) < target:
        return None
    # Bisect until no float lies between the two: with a large alpha, weights span many orders of magnitude.
    while low < (middle := (low + high) / 2) < high:
        if _removed(sizes, _round_ratio(sizes, weights, middle)) <= target:
            low = middle
        else:
            high = middle
    layers = list(_round_ratio(sizes, weights, low))
    above = _round_ratio(sizes, weights, high)
    missing = target - _removed(sizes, layers)
    # Just above `low`, one or more layers lose another unit. Remove these in turn, as far as the target allows.
    for layer in weights:
        missing -= _take(sizes[layer], layers, layer, missing, units=above[layer].units)
    _fill_with_channels(sizes, list(weights), layers, missing)
    if any(size.limit < 1 or not size.num_channels for size in sizes):
        return _exchange(sizes, weights, layers, target)
    return tuple(layers)


@dataclass(frozen=True)
class _Module:
    """The heads or the channels of a layer; `weight` is the layer's."""

    number: int
    removable: int
    unit_parameters: int
    bias_parameters: int
    weight: float

    def removed_parameters(self, num_removed: int) -> int:
        """Return by how many parameters the module shrinks without some units."""
        return num_removed * self.unit_parameters - self.bias_parameters * (num_removed > 0)


def _exchange(
    sizes: Sequence[LayerSize], weights: dict[int, float], layers: Sequence[LayerBudget], target: int
) -> tuple[LayerBudget, ...]:
    """Remove heads in place of channels where the pruned layers have lost all channels that they may."""
    modules = [
        _Module(number, may_go * (layer in weights), parameters, bias, weights.get(layer, 0.0))
        for layer, size in enumerate(sizes)
        for number, may_go, parameters, bias in (
            (size.num_units, size.removable_units, size.unit_parameters, size.attention_bias_parameters),
            (size.num_channels, size.removable_channels, size.channel_parameters, size.mlp_bias_parameters),
        )
    ]
    removed = [count for layer in layers for count in (layer.units, layer.channels)]

    def ratio(index: int, count: int) -> float:
        # A unit goes when the ratio, times the layer's weight, comes to it.
        return (count + 1) / modules[index].number / max(modules[index].weight, 1e-300)

    counts = iter(close_gap(modules, removed, target, ratio))
    return tuple(replace(layer, units=next(counts), channels=next(counts)) for layer in layers)


def _fill_with_channels(
    sizes: Sequence[LayerSize], open_layers: list[int], layers: list[LayerBudget], missing: int
) -> None:
    """Remove channels, one per layer in turn, until no further channel fits into what is missing."""
    while open_layers:
        still_open = []
        for layer in open_layers:
            channels = layers[layer].channels + 1
            if channels <= sizes[layer].removable_channels:
                taken = _take(sizes[layer], layers, layer, missing, channels=channels)
                missing -= taken
                still_open += [layer] * (taken > 0)
        open_layers = still_open


def _take(size: LayerSize, layers: list[LayerBudget], layer: int, missing: int, **counts: int) -> int:
    """Raise a layer's counts if that removes no more than what is missing, and return how much it removed."""
    more = replace(layers[layer], **counts)
    gain = _removed_from(size, more) - _removed_from(size, layers[layer])
    if not 0 < gain <= missing:
        return 0
    layers[layer] = more
    return gain


def _round_ratio(sizes: Sequence[LayerSize], weights: dict[int, float], ratio: float) -> tuple[LayerBudget, ...]:
    """Round every layer's share, half to even like the published code, and bound it by what the layer can give."""
    layers = []
    for layer, size in enumerate(sizes):
        share = ratio * weights.get(layer, 0.0)
        units = min(round(share * size.num_units), size.removable_units)
        channels = min(round(share * size.num_channels), size.removable_channels)
        layers.append(LayerBudget(share, units, channels))
    return tuple(layers)


def _removed_from(size: LayerSize, layer: LayerBudget) -> int:
    return size.removed_parameters(layer.units, layer.channels)


def _removed(sizes: Sequence[LayerSize], layers: Sequence[LayerBudget]) -> int:
    return sum(_removed_from(size, layer) for size, layer in zip(sizes, layers, strict=True))
