"""Constrains the shapes of a pruned model, so that stock classes and servers can load it.

By default, every layer has its own number of heads and channels, and a bias where its recovery needs one. A uniform
model has the same numbers in every layer, though not the same heads and channels; or only the heads are as many in
every layer. Heads and channels may be removed in steps, so that the rest is a multiple of a tile or of a
tensor-parallel degree. Recovery may go without an intercept. Layers may stay whole, or lose a fraction at most.

A constraint changes what a budget is spent on: steps instead of units, and modules of all layers as one if they must be
alike. A limit bounds how much of each module the budget can take. Nothing else depends on the form, except that
recovery fits without an intercept by moments about zero, and that refinement leaves whole layers as they are.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from slimllm_ops.allocate.budget import Candidate, as_one, cost_per_parameter, in_steps
from slimllm_ops.allocate.gap import close_gap
from slimllm_ops.allocate.layer_ratios import LayerBudget
from slimllm_ops.allocate.layer_size import LayerSize
from slimllm_ops.errors import InputError
from slimllm_ops.models.pair import Pair

# Spends a number of parameters on modules: returns how many units each loses.
Rule = Callable[[Sequence[Candidate], int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Form:
    """The constraints on a pruned model's shapes.

    Attributes:
        uniform: Whether every layer has the same numbers of heads and channels.
        uniform_heads: Whether every layer has the same number of heads, and its own number of channels.
        multiple_of: A divisor of the number of channels that every layer keeps.
        heads_multiple_of: A divisor of the number of KV heads that every layer keeps, and so of its heads: every KV
            head is shared by the same number of them.
        with_bias: Whether recovery may add a bias to an output projection.
        drop_layers: Whether whole layers may be removed.
        whole_layers: The layers that stay as they are.
        limit: The greatest fraction of its heads, and of its channels, that any layer may lose.
    """

    uniform: bool = False
    uniform_heads: bool = False
    multiple_of: int = 1
    heads_multiple_of: int = 1
    with_bias: bool = True
    drop_layers: bool = False
    whole_layers: frozenset[int] = frozenset()
    limit: float = 1.0

    def limited(self, sizes: Sequence[LayerSize]) -> list[LayerSize]:
        """Return the sizes of the layers with the fraction that each may lose."""
        limits = (0.0 if layer in self.whole_layers else self.limit for layer in range(len(sizes)))
        return [replace(size, limit=limit) for size, limit in zip(sizes, limits, strict=True)]

    def sizes(self, sizes: Sequence[LayerSize]) -> list[LayerSize]:
        """Return the sizes that a budget is spent on: every layer in its steps, or what is alike in all layers as one.

        If only the heads are alike, the layers come without them, and the heads of all layers after them.

        Raises:
            InputError: A layer does not make whole steps, or the layers differ although they must be alike.
        """
        stepped = [self._in_steps(layer, size) for layer, size in enumerate(self.limited(sizes))]
        if self.uniform:
            return [_as_one(stepped)]
        return [*map(_without_heads, stepped), _heads_as_one(stepped)] if self.uniform_heads else stepped

    def layers(self, spent: Sequence[LayerBudget], num_layers: int) -> tuple[LayerBudget, ...]:
        """Return the budget of every layer of the model, from the budgets spent on `sizes`."""
        budgets = [
            replace(one, units=one.units * self.heads_multiple_of, channels=one.channels * self.multiple_of)
            for one in spent
        ]
        if self.uniform_heads and not self.uniform:
            *budgets, heads = budgets
            budgets = [replace(one, units=heads.units) for one in budgets]
        return tuple(budgets * (num_layers // len(budgets)))

    def spend(
        self,
        rule: Rule,
        candidates: Sequence[Pair[Candidate]],
        target: int,
    ) -> list[Pair[int]]:
        """Return how many units to remove from every module, by a rule of `slimllm_ops.allocate.budget`.

        Args:
            rule: Function that spends a budget.
            candidates: The modules of each layer.
            target: Number of parameters to remove.
        """
        # In a mixture of experts, every expert loses a channel at the same time.
        widths = [Pair(self.heads_multiple_of, self.multiple_of * pair.mlp.units_at_once) for pair in candidates]
        steps = [pair.join(width, in_steps) for pair, width in zip(candidates, widths, strict=True)]
        heads, channels = [pair.attention for pair in steps], [pair.mlp for pair in steps]
        if self.uniform:
            spent = [Pair(*self._by(rule, [as_one(heads), as_one(channels)], target))] * len(steps)
        elif self.uniform_heads:
            alike = as_one(heads, layer=sum(one.layer for one in heads) / len(heads))
            units, *counts = self._by(rule, [alike, *channels], target)
            spent = [Pair(units, count) for count in counts]
        else:
            given = iter(self._by(rule, [one for pair in steps for one in pair], target))
            spent = [Pair(next(given), next(given)) for _ in steps]
        return [count.join(width, operator.mul) for count, width in zip(spent, widths, strict=True)]

    def _by(self, rule: Rule, modules: Sequence[Candidate], target: int) -> list[int]:
        """Spend a budget by a rule; where small units may run out, remove large ones for them."""
        removed = rule(modules, target)
        if not (self.uniform_heads or self.whole_layers or self.limit < 1):
            return removed
        return close_gap(modules, removed, target, lambda i, count: cost_per_parameter(modules[i], count))

    def warnings(self, sizes: Sequence[LayerSize]) -> list[str]:
        """Return what a user may not expect of the form: that no head, or no channel, can go."""
        found = self.sizes(sizes)
        may_go = f"at most {self.limit:g} of them may go" if self.limit < 1 else "not all of them may go"
        kinds = (
            (
                "KV heads",
                self.heads_multiple_of,
                [one.num_units for one in sizes],
                [one.removable_units for one in found],
            ),
            (
                "channels",
                self.multiple_of,
                [one.num_channels for one in sizes],
                [one.removable_channels for one in found],
            ),
        )
        return [
            f"no {kind} can go: a layer has {max(numbers)}, they go {step} at a time, and {may_go}"
            for kind, step, numbers, removable in kinds
            if max(numbers) > 1 and not any(removable)
        ]

    def _in_steps(self, layer: int, size: LayerSize) -> LayerSize:
        """Return a layer's size with units that are removed together as one."""
        kv_heads = size.num_units * size.kv_heads_per_unit
        for number, step, kind, option in (
            (kv_heads, self.heads_multiple_of, "KV heads", "--heads-multiple-of"),
            (size.num_channels, self.multiple_of, "channels", "--multiple-of"),
        ):
            if number % step:
                raise InputError(
                    f"layer {layer} has {number} {kind}, which is not a multiple of {step}: "
                    f"pass {option} or --for-tp with a divisor"
                )
        # A whole attention is one unit, whose heads all stay.
        heads = math.gcd(self.heads_multiple_of, size.num_units)
        return replace(
            size,
            num_units=size.num_units // heads,
            unit_parameters=size.unit_parameters * heads,
            num_channels=size.num_channels // self.multiple_of,
            channel_parameters=size.channel_parameters * self.multiple_of,
        )


def layers_named(names: Iterable[int], num_layers: int) -> frozenset[int]:
    """Return the layers that some numbers name; negative ones count from the end.

    Raises:
        InputError: There is no such layer.
    """
    layers = set()
    for name in names:
        if not -num_layers <= name < num_layers:
            raise InputError(
                f"layer {name} is to stay whole, but there are {num_layers} layers: name 0 to {num_layers - 1}, or "
                f"-1 to {-num_layers} from the end"
            )
        layers.add(name % num_layers)
    return frozenset(layers)


def _as_one(sizes: Sequence[LayerSize]) -> LayerSize:
    """Return the size of all layers, if they are alike."""
    first, number = sizes[0], len(sizes)
    for layer, size in enumerate(sizes):
        if size != first:
            raise InputError(
                f"layer {layer} and layer 0 have different numbers of heads or channels: --uniform needs a model "
                f"whose layers are alike"
            )
    return replace(
        first,
        unit_parameters=first.unit_parameters * number,
        channel_parameters=first.channel_parameters * number,
        attention_bias_parameters=first.attention_bias_parameters * number,
        mlp_bias_parameters=first.mlp_bias_parameters * number,
        parameters=first.parameters * number,
        num_layers=number,
    )


def _heads_as_one(sizes: Sequence[LayerSize]) -> LayerSize:
    """Return the size of the heads of all layers, without a channel, if they are alike."""
    heads = [
        replace(
            size,
            num_channels=0,
            channel_parameters=0,
            mlp_bias_parameters=0,
            num_experts=1,
            parameters=size.num_units * size.unit_parameters,
        )
        for size in sizes
    ]
    for layer, size in enumerate(heads):
        if size != heads[0]:
            raise InputError(
                f"layer {layer} and layer 0 have different numbers of heads: --uniform-heads needs a model whose "
                f"layers have the same"
            )
    return _as_one(heads)


def _without_heads(size: LayerSize) -> LayerSize:
    """Return a layer's size without its heads."""
    return replace(
        size,
        num_units=0,
        unit_parameters=0,
        attention_bias_parameters=0,
        parameters=size.parameters - size.num_units * size.unit_parameters,
    )
