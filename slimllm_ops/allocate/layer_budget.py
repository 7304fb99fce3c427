r"""Whole layers as units of a budget, beside heads and channels.

A layer that goes changes the residual stream by what it added, and nothing recovers that: its error is
E|h_out - h_in|^2, in the same units as those of modules, and is scaled as theirs. As a module's scale weighs the
power of its output against the stream's, so does a layer's, whose output is what it adds.

Layers are ordered by their error per parameter. How many of them go is found by trying: for every number, the rest of
the target is spent on the units of the layers that stay, and the least sum of scaled errors is best. A unit's error
cannot be weighed against a layer's one at a time, since a layer is worth less the more of its units have gone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.layer_ratios import LayerSize
from slimllm_ops.decide.paths import LayerPaths
from slimllm_ops.errors import InputError
from slimllm_ops.moments.ranking import Ranking


@dataclass(frozen=True)
class Spent:
    """What a budget took: how many units of every module, none of those in layers that go as a whole."""

    units: tuple[int, ...]
    dropped: frozenset[int] = frozenset()


def layer_candidates(sizes: Sequence[LayerSize], paths: Sequence[LayerPaths]) -> list[Candidate]:
    """Return every layer as a module of one unit, which may go.

    Args:
        sizes: what each layer is made of.
        paths: what the pass left of each layer, the change that it makes included.
    """
    return [
        Candidate(
            layer=layer,
            ranking=Ranking((0,), (_change(path),)),
            unit_parameters=size.parameters,
            bias_parameters=0,
            output_variance=_change(path),
            stream_power=path.stream_power,
        )
        for layer, (size, path) in enumerate(zip(sizes, paths, strict=True))
    ]


def spend_on_layers_too(
    layers: Sequence[Candidate],
    modules: Sequence[Candidate],
    target: int,
    spend: Callable[[Sequence[Candidate], int], list[int]],
) -> Spent:
    """Return which layers go, and how many units of those that stay.

    Args:
        layers: every layer as a whole.
        modules: their modules, layer by layer, attention before the MLP.
        target: parameters to remove.
        spend: how a budget is spent on modules.

    Raises:
        InputError: so much cannot be removed, however many layers go.
    """
    order = sorted(range(len(layers)), key=lambda layer: _error(layers[layer], 1) / layers[layer].unit_parameters)
    tried, refused = list[tuple[float, Spent]](), None
    # One layer stays: without any it is no model.
    for number in range(len(layers)):
        dropped = frozenset(order[:number])
        rest = target - sum(layers[layer].unit_parameters for layer in dropped)
        if rest < 0:
            break
        try:
            units = _spend_on_kept(modules, dropped, rest, spend)
        except InputError as error:
            refused = error
        else:
            lost = sum(map(_error, modules, units)) + sum(_error(layers[layer], 1) for layer in dropped)
            tried.append((lost, Spent(units, dropped)))
    if not tried:
        assert refused is not None, "with no layer gone there is a rest to spend"
        raise refused
    return min(tried, key=lambda one: one[0])[1]


def _spend_on_kept(
    modules: Sequence[Candidate],
    dropped: frozenset[int],
    target: int,
    spend: Callable[[Sequence[Candidate], int], list[int]],
) -> tuple[int, ...]:
    """Return how many units every module gives, those of dropped layers none."""
    kept = [index for index in range(len(modules)) if index // 2 not in dropped]
    counts = dict(zip(kept, spend([modules[index] for index in kept], target), strict=True))
    return tuple(counts.get(index, 0) for index in range(len(modules)))


def _error(candidate: Candidate, num_removed: int) -> float:
    """Return the error of removing so many units, in what compares across modules."""
    return sum(candidate.ranking.costs[:num_removed]) / candidate.scale


def _change(path: LayerPaths) -> float:
    assert path.change is not None, "moments without it are refused where layers may go"
    return path.change
