"""Runs one branch of a decoder layer, from the states it reads to what it adds to the residual stream.

A branch runs without its output projection, so it returns X, the projection's input. Its output, dense or pruned, is
then X[:, S] W + b, without a second forward pass. An MLP of experts works the same way: its router and activation are
the model's own, and the rest is code of this package (`slimllm_ops.moments.routing`).

Shapes: b blocks in a batch, T tokens in a block, D hidden size, P inputs of an output projection, S of them kept, E
experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from slimllm_ops.checkpoint.surgery import recovered_experts, recovered_projection
from slimllm_ops.decide.plan import Decision
from slimllm_ops.models.families import Branch
from slimllm_ops.moments.observation import ObservationSum, Observed
from slimllm_ops.moments.routing import Routed, RoutedStates, RoutedSum, project, route
from slimllm_ops.moments.states import States, StateStore
from slimllm_ops.stream.padding import without_padding
from slimllm_ops.stream.weights import ModelWeights

# A norm blocks the dims whose gain is below this fraction of its largest gain.
SMALLEST_GAIN = 1e-3

# The input of the output projection: X (b, T, P), or `Routed` with experts.
X = TypeVar("X")
Taken = TypeVar("Taken", contravariant=True)


class Sum(Protocol[Taken]):
    """A running sum of observations of a branch over batches."""

    def add(self, x: Taken, inputs: Tensor, /) -> None:
        """Add the inputs of the output projection and of the branch itself (b, T, D)."""

    def packed(self) -> Observed:
        """Return the observation of all tokens so far."""


class Held(Protocol[X]):
    """The inputs of the output projection, one per batch, kept until a decision is made."""

    def append(self, x: X, /) -> None:
        """Add a batch."""

    def __iter__(self) -> Iterator[X]: ...


class LayerBranch(ABC, Generic[X]):
    """A branch of a layer, with its weights. The caller says whether gradients are recorded.

    Args:
        weights: The model's weights.
        layer: The layer's number.
        branch: The branch of that layer.
    """

    def __init__(self, weights: ModelWeights, layer: int, branch: Branch) -> None:
        self._weights = weights
        self._layer = layer
        self._branch = branch
        self._multiplier = weights.checkpoint.family.multiplier(weights.checkpoint.config)

    @abstractmethod
    def begin_sum(self) -> Sum[X]:
        """Return a sum without tokens."""

    @abstractmethod
    def begin_states(self, store: StateStore) -> Held[X]:
        """Return an empty store for the inputs of the output projection."""

    @abstractmethod
    def run(self, normalised: Tensor) -> X:
        """Return the output projection's input for the branch's input (b, T, D)."""

    @abstractmethod
    def without_padding(self, x: X, mask_bT: Tensor) -> X:
        """Return the output projection's input at the tokens that a mask (b, T) names, as one block."""

    @abstractmethod
    def projected(self, decision: Decision | None) -> Callable[[X], Tensor]:
        """Return a function from the projection's input to its output (b, T, D), pruned if there is a decision."""

    def normalise(self, hidden: Tensor) -> Tensor:
        """Return the branch's input (b, T, D) for states of the residual stream (b, T, D)."""
        norm = self._branch.reading.norm
        return hidden if norm is None else self._loaded().get_submodule(norm)(hidden)

    def contribution(self, output: Tensor) -> Tensor:
        """Return what the branch adds to the residual stream (b, T, D) for its output projection's output (b, T, D)."""
        if (norm := self._branch.reading.output_norm) is not None:
            output = self._loaded().get_submodule(norm)(output)
        return output if self._multiplier == 1 else output * self._multiplier

    @torch.inference_mode()
    def change_of_output(self, output: Tensor, change: Tensor) -> Tensor:
        """Return the change of the output that changes the contribution by `change`, all (b, T, D).

        This is exact unless the output has a norm, an RMS norm in all such families: its divisor is held constant.
        """
        change = change / self._multiplier
        if (norm := self._branch.reading.output_norm) is None:
            return change
        gain_D = self._loaded().get_submodule(norm)(torch.ones_like(output[0, 0]))
        # A dim that the norm blocks cannot be changed through it.
        passes_D = gain_D.abs() > SMALLEST_GAIN * gain_D.abs().max()
        rms = output.float().square().mean(dim=-1, keepdim=True).sqrt().to(output)
        return torch.where(passes_D, change / torch.where(passes_D, gain_D, 1.0), 0.0) * rms

    def added(self, normalised: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what the branch adds to the residual stream (b, T, D), with some tensors of its layer replaced.

        Args:
            normalised: The branch's input (b, T, D).
            tensors: The tensors that take the place of the layer's own, by their names in the layer.
        """
        layer = _Called(self._loaded(), lambda: self.contribution(self.projected(None)(self.run(normalised))))
        return functional_call(layer, {f"{layer.PREFIX}{name}": tensor for name, tensor in tensors.items()}, ())

    def _loaded(self) -> nn.Module:
        """Return the layer with its weights."""
        return self._weights.load(self._layer)


class _Called(nn.Module):
    """A layer that computes something with the weights that it has when it is called."""

    PREFIX = "layer."

    def __init__(self, layer: nn.Module, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.forward = compute


class PlainBranch(LayerBranch[Tensor]):
    """A branch with one output projection."""

    def begin_sum(self) -> ObservationSum:
        """Return a sum without tokens."""
        return ObservationSum()

    def begin_states(self, store: StateStore) -> States:
        """Return an empty store for X."""
        return store()

    def run(self, normalised: Tensor) -> Tensor:
        """Return X (b, T, P) for the branch's input (b, T, D)."""
        module, branch = self._loaded(), self._branch
        if branch.reading.activation is not None:
            (name,) = branch.inputs
            return module.get_submodule(branch.reading.activation)(module.get_submodule(name)(normalised))
        is_attention = branch == self._weights.checkpoint.family.attention
        part = module.get_submodule(branch.module)
        with _without(part, branch.names.output):
            output = part(normalised, **(self._weights.call(self._layer) if is_attention else {}))
        return output[0] if isinstance(output, tuple) else output

    def without_padding(self, x: Tensor, mask_bT: Tensor) -> Tensor:
        """Return X (1, n, P) at the tokens that a mask (b, T) names."""
        return without_padding(x, mask_bT)

    def projected(self, decision: Decision | None) -> Callable[[Tensor], Tensor]:
        """Return a function from X (b, T, P) to the output (b, T, D), pruned if there is a decision."""
        projection = cast(nn.Linear, self._loaded().get_submodule(self._branch.output))
        weight_DS: Tensor = projection.weight
        bias_D: Tensor | None = projection.bias
        kept_S: Tensor | slice = slice(None)
        if decision is not None:
            weight_DS, bias_D = recovered_projection(weight_DS, bias_D, decision)
            kept_S = decision.kept_rows(projection.weight.shape[1]).to(self._weights.device)
        return lambda x_bTP: functional.linear(x_bTP[..., kept_S], weight_DS, bias_D)


class ExpertsBranch(LayerBranch[Routed]):
    """An MLP of experts, each with its own output projection."""

    def begin_sum(self) -> RoutedSum:
        """Return a sum without tokens."""
        checkpoint = self._weights.checkpoint
        return RoutedSum(checkpoint.family.num_experts(checkpoint.config))

    def begin_states(self, store: StateStore) -> RoutedStates:
        """Return an empty store for X and the numbers of its experts."""
        return RoutedStates(store)

    def run(self, normalised: Tensor) -> Routed:
        """Return the inputs of the experts' output projections for the branch's input (b, T, D)."""
        module, read = self._loaded(), self._branch.reading.experts
        assert read is not None, "a branch without experts has one output projection"
        (gate_up,) = self._branch.inputs
        activation = module.get_submodule(self._branch.module).get_submodule(read.activation)
        return route(module.get_submodule(read.router), module.get_parameter(gate_up), activation, normalised)

    def without_padding(self, x: Routed, mask_bT: Tensor) -> Routed:
        """Return X (1, n, k, I) and its experts at the tokens that a mask (b, T) names."""
        return Routed(*(without_padding(part, mask_bT) for part in x))

    def projected(self, decision: Decision | None) -> Callable[[Routed], Tensor]:
        """Return a function from the experts' X to the output (b, T, D), pruned if there is a decision."""
        weight_EDS: Tensor = self._loaded().get_parameter(self._branch.output)
        kept_ES: Tensor | None = None
        if decision is not None:
            weight_EDS, kept_ES = recovered_experts(weight_EDS, decision)
        return lambda routed: project(routed, weight_EDS, kept_ES)


def layer_branch(weights: ModelWeights, layer: int, branch: Branch) -> LayerBranch[Any]:
    """Return a branch of a layer, ready to run; only this function checks whether it has experts."""
    kind = ExpertsBranch if branch.has_experts else PlainBranch
    return kind(weights, layer, branch)


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Skip the last part that a module runs, so that the module returns that part's input."""
    part = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, part)
