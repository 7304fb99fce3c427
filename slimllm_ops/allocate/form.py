"""Constrains the shapes of a pruned model, so that stock classes and servers can load it.

By default, every layer has its own number of heads and channels, and a bias where its recovery needs one. A uniform
model has the same numbers in every layer, though not the same heads and channels. Channels may be removed in steps, so
that the rest is a multiple of a tile or a tensor-parallel degree. Recovery may go without an intercept.

A constraint changes what a budget is spent on: steps of channels instead of channels, and all layers as one if they
must be uniform. Nothing else depends on the form except recovery, which fits without an intercept by moments about
zero.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slimllm_ops.allocate.budget import Candidate, as_one, in_steps
from slimllm_ops.allocate.layer_ratios import LayerBudget
from slimllm_ops.allocate.layer_size import LayerSize
from slimllm_ops.errors import InputError
from slimllm_ops.models.pair import Pair


@dataclass(frozen=True, kw_only=True)
class Form:
    """The constraints on a pruned model's shapes.

    Attributes:
        uniform: Whether every layer has the same numbers of heads and channels.
        multiple_of: A divisor of the number of channels that every layer keeps.
        with_bias: Whether recovery may add a bias to an output projection.
        drop_layers: Whether whole layers may be removed.
    """

    uniform: bool = False
    multiple_of: int = 1
    with_bias: bool = True
    drop_layers: bool = False

    def sizes(self, sizes: Sequence[LayerSize]) -> list[LayerSize]:
        """Return the sizes that a budget is spent on: every layer with its channels in steps, or all layers as one.

        Raises:
            InputError: A layer's channels do not make whole steps, or the layers differ although they must be uniform.
        """
        for layer, size in enumerate(sizes):
            if size.num_channels % self.multiple_of:
                raise InputError(
                    f"layer {layer} has {size.num_channels} channels, which is not a multiple of {self.multiple_of}: "
                    f"pass --multiple-of with a divisor"
                )
        stepped = [
            replace(
                size,
                num_channels=size.num_channels // self.multiple_of,
                channel_parameters=size.channel_parameters * self.multiple_of,
            )
            for size in sizes
        ]
        return [self._as_one(stepped)] if self.uniform else stepped

    def layers(self, spent: Sequence[LayerBudget], num_layers: int) -> tuple[LayerBudget, ...]:
        """Return the budget of every layer of the model, from the budgets spent on `sizes`."""
        budgets = tuple(replace(one, channels=one.channels * self.multiple_of) for one in spent)
        return budgets * num_layers if self.uniform else budgets

    def spend(
        self,
        rule: Callable[[Sequence[Candidate], int], list[int]],
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
        widths = [Pair(1, self.multiple_of * pair.mlp.units_at_once) for pair in candidates]
        steps = [pair.join(width, in_steps) for pair, width in zip(candidates, widths, strict=True)]
        if self.uniform:
            alike = [as_one([pair.attention for pair in steps]), as_one([pair.mlp for pair in steps])]
            spent = [Pair(*rule(alike, target))] * len(steps)
        else:
            counts = iter(rule([one for pair in steps for one in pair], target))
            spent = [Pair(next(counts), next(counts)) for _ in steps]
        return [count.join(width, operator.mul) for count, width in zip(spent, widths, strict=True)]

    @staticmethod
    def _as_one(sizes: Sequence[LayerSize]) -> LayerSize:
        first = sizes[0]
        for layer, size in enumerate(sizes):
            if size != first:
                raise InputError(
                    f"layer {layer} and layer 0 have different numbers of heads or channels: --uniform needs a model "
                    f"whose layers are alike"
                )
        number = len(sizes)
        return LayerSize(
            num_units=first.num_units,
            unit_parameters=first.unit_parameters * number,
            num_channels=first.num_channels,
            channel_parameters=first.channel_parameters * number,
            attention_bias_parameters=first.attention_bias_parameters * number,
            mlp_bias_parameters=first.mlp_bias_parameters * number,
            parameters=first.parameters * number,
            num_experts=first.num_experts,
            num_layers=number,
        )
