r"""Spends a budget on whole layers as well as on heads and channels.

Removing a layer removes what it added to the residual stream, and nothing recovers that. So its error is
e = h_out - h_in. It costs the loss 1/2 E|g|^2 E|e|^2 / D, with g the gradient of the loss at the layer's output. The
costs of a module's units are in the same unit, nats per token.

Layers are ordered by their error per parameter. The number of layers to remove is found by trying every number: the
rest of the target is spent on the units of the layers that stay, and the least sum of costs wins. Comparing
units and layers one at a time would not work, since a layer is worth less the more of its units are gone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.layer_size import LayerSize
from slimllm_ops.decide.paths import LayerPaths
from slimllm_ops.decide.sensitivity import Sensitivity
from slimllm_ops.errors import InputError
from slimllm_ops.models.pair import Pair
from slimllm_ops.moments.ranking import Ranking


@dataclass(frozen=True)
class Spent:
    """A spent budget: the units to remove from each layer's modules, none in dropped layers, and those layers."""

    units: tuple[Pair[int], ...]
    dropped: frozenset[int] = frozenset()


def layer_candidates(
    sizes: Sequence[LayerSize], paths: Sequence[LayerPaths], sensitivities: Iterable[Sensitivity]
) -> list[Candidate]:
    """Return every layer as a candidate with one unit, the layer itself.

    Args:
        sizes: The size of each layer.
        paths: The results of the calibration pass for each layer, including `change`.
        sensitivities: The sensitivity of each layer; one at a time is held.
    """
    return [
        Candidate(
            layer=layer,
            ranking=Ranking((0,), (sensitivity.loss_of_change(_change(path)),)),
            unit_parameters=size.parameters,
            bias_parameters=0,
            output_variance=_change(path),
            stream_power=path.stream_power,
            limit=size.limit,
        )
        for layer, (size, path, sensitivity) in enumerate(zip(sizes, paths, sensitivities, strict=True))
    ]


def spend_on_layers_too(
    layers: Sequence[Candidate],
    modules: Sequence[Pair[Candidate]],
    target: int,
    spend: Callable[[Sequence[Pair[Candidate]], int], list[Pair[int]]],
) -> Spent:
    """Return which layers to drop, and how many units to remove from the others.

    Args:
        layers: Every layer as a whole.
        modules: The modules of each layer.
        target: Number of parameters to remove.
        spend: Function that spends a budget on modules.

    Raises:
        InputError: The target cannot be met, however many layers are dropped.
    """
    may_go = [layer for layer, one in enumerate(layers) if one.limit > 0]
    order = sorted(may_go, key=lambda layer: _error(layers[layer], 1) / layers[layer].unit_parameters)
    tried, refused = list[tuple[float, Spent]](), None
    # At least one of them stays.
    for number in range(len(order)):
        dropped = frozenset(order[:number])
        rest = target - sum(layers[layer].unit_parameters for layer in dropped)
        if rest < 0:
            break
        try:
            units = _spend_on_kept(modules, dropped, rest, spend)
        except InputError as error:
            refused = error
        else:
            errors = (error for pair, counts in zip(modules, units, strict=True) for error in pair.join(counts, _error))
            lost = sum(errors) + sum(_error(layers[layer], 1) for layer in dropped)
            tried.append((lost, Spent(units, dropped)))
    if not tried:
        assert refused is not None, "with no layer gone there is a rest to spend"
        raise refused
    return min(tried, key=lambda one: one[0])[1]


def _spend_on_kept(
    modules: Sequence[Pair[Candidate]],
    dropped: frozenset[int],
    target: int,
    spend: Callable[[Sequence[Pair[Candidate]], int], list[Pair[int]]],
) -> tuple[Pair[int], ...]:
    """Return how many units to remove from each layer's modules; none from those of dropped layers."""
    kept = [layer for layer in range(len(modules)) if layer not in dropped]
    counts = dict(zip(kept, spend([modules[layer] for layer in kept], target), strict=True))
    return tuple(counts.get(layer, Pair(0, 0)) for layer in range(len(modules)))


def _error(candidate: Candidate, num_removed: int) -> float:
    """Return what the first `num_removed` removals cost."""
    return sum(candidate.ranking.costs[:num_removed])


def _change(path: LayerPaths) -> float:
    assert path.change is not None, "moments without it are refused where layers may go"
    return path.change
