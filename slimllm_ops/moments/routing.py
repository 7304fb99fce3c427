r"""Routes tokens through a mixture of experts, and observes each expert.

A router sends each token to k of E experts, with a weight r for each. The branch adds

    y = sum_e r_e x_e W_e

over the token's experts, where x_e is the input of the output projection W_e of expert e. Once r_e is multiplied in,
X_e = r_e x_e, each expert's output projection is like any other, but over its own tokens. So each expert is observed
by the moments of X_e over the tokens that it received.

Shapes: b blocks in a batch, T tokens in a block, N = b T tokens, D hidden size, E experts, k experts per token,
I channels per expert, S of them kept, n tokens of one expert.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimllm_ops.moments.observation import (
    ObservationSum,
    Observed,
    PackedObservation,
    Part,
    require_count,
)
from slimllm_ops.moments.states import States, StateStore

T = TypeVar("T")


class Routed(NamedTuple):
    """X of a batch, for each of a token's k experts, and the numbers of those experts."""

    x_bTkI: Tensor
    experts_bTk: Tensor


@torch.inference_mode()
def route(router: nn.Module, gate_up_ERD: Tensor, activation: nn.Module, input_bTD: Tensor) -> Routed:
    """Send tokens through the experts that a router chooses, up to the output projections.

    Args:
        router: Maps tokens (N, D) to logits, expert weights (N, k) and expert numbers (N, k).
        gate_up_ERD: The experts' gate and up weights, stacked to R = 2 I rows.
        activation: The activation after the gate.
        input_bTD: The tokens.
    """
    input_ND = input_bTD.flatten(0, 1)
    _, weights_Nk, experts_Nk = router(input_ND)
    x_NkI = input_ND.new_empty(*experts_Nk.shape, gate_up_ERD.shape[1] // 2)
    for expert, tokens_n, places_n in _reached(experts_Nk):
        gate_nI, up_nI = functional.linear(input_ND[tokens_n], gate_up_ERD[expert]).chunk(2, dim=-1)
        x_nI = activation(gate_nI) * up_nI * weights_Nk[tokens_n, places_n, None]
        x_NkI[tokens_n, places_n] = x_nI.to(x_NkI)
    shape = input_bTD.shape[:2]
    return Routed(x_NkI.unflatten(0, shape), experts_Nk.unflatten(0, shape))


@torch.inference_mode()
def project(routed: Routed, weight_EDS: Tensor, kept_ES: Tensor | None) -> Tensor:
    """Return the sum of the experts' outputs (b, T, D).

    Args:
        routed: The inputs of their output projections.
        weight_EDS: The weights of their output projections.
        kept_ES: The channels that each expert keeps; None if it keeps all.
    """
    x_NkI, experts_Nk = routed.x_bTkI.flatten(0, 1), routed.experts_bTk.flatten(0, 1)
    output_ND = x_NkI.new_zeros(len(x_NkI), weight_EDS.shape[1])
    for expert, tokens_n, places_n in _reached(experts_Nk):
        x_nS = x_NkI[tokens_n, places_n]
        if kept_ES is not None:
            x_nS = x_nS[:, kept_ES[expert]]
        # A token reaches an expert at most once, so `tokens_n` has no duplicates, and this adds every row.
        output_ND[tokens_n] += functional.linear(x_nS, weight_EDS[expert])
    return output_ND.unflatten(0, routed.x_bTkI.shape[:2])


def _reached(experts_Nk: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that received tokens, with the tokens (n,) and its place among their k experts (n,)."""
    for expert in experts_Nk.unique().tolist():
        yield expert, *torch.where(experts_Nk == expert)


class RoutedStates:
    """The inputs of the experts' output projections, one per batch of a stream, kept until a decision is made."""

    def __init__(self, store: StateStore) -> None:
        self._x: States = store()
        self._experts: States = store()

    def __iter__(self) -> Iterator[Routed]:
        return map(Routed, self._x, self._experts)

    def append(self, routed: Routed) -> None:
        """Add a batch."""
        self._x.append(routed.x_bTkI)
        self._experts.append(routed.experts_bTk)


@dataclass(frozen=True)
class PackedExperts:
    """The observations of a layer's experts in NumPy, in the form that is sent and merged.

    Experts have no bias and get none, so their moments are unpacked about zero.

    Attributes:
        count: Number of tokens in the stream.
        experts: Each expert's observation over the tokens it received; None without tokens.
    """

    count: int
    experts: tuple[PackedObservation | None, ...]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PackedExperts":
        """Return the observations that `to_arrays` wrote, and ignore other arrays."""
        num_experts, count = arrays["experts"].tolist()
        experts = (_beginning_with(f"{expert}.", arrays) for expert in range(num_experts))
        return cls(count, tuple(PackedObservation.from_arrays(one) if one else None for one in experts))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the observations as named arrays: "0.count" is the count of expert 0."""
        arrays = {"experts": np.array([len(self.experts), self.count])}
        for expert, seen in enumerate(self.experts):
            if seen is not None:
                arrays |= {f"{expert}.{name}": array for name, array in seen.to_arrays().items()}
        return arrays

    @property
    def intercept(self) -> bool:
        """Always false: an expert's recovery never has an intercept."""
        return False

    @property
    def num_bytes(self) -> int:
        """The size of the arrays in bytes."""
        return sum(seen.num_bytes for seen in self.experts if seen is not None)

    @property
    def idle(self) -> tuple[int, ...]:
        """The experts that received no tokens."""
        return tuple(expert for expert, seen in enumerate(self.experts) if seen is None)

    def share(self, expert: int) -> float:
        """Return the fraction of tokens that an expert received."""
        seen = self.experts[expert]
        return 0.0 if seen is None else seen.moments.count / self.count

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the observations cover `num_tokens` tokens.

        Raises:
            MiscountError: They cover fewer or more tokens.
        """
        require_count(self.count, num_tokens)

    def is_finite(self) -> bool:
        """Return whether every expert's observation is free of NaN and infinity."""
        return all(seen.is_finite() for seen in self.experts if seen is not None)

    def merge(self, other: "PackedExperts") -> "PackedExperts":
        """Return the observations of both sets of tokens."""
        merged = tuple(map(_merge, self.experts, other.experts))
        return PackedExperts(self.count + other.count, merged)

    def with_intercept(self, intercept: bool) -> "PackedExperts":
        """Return the same observations; experts never have an intercept."""
        return self

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split a stored tensor of all experts (E, ...) into one per expert."""
        return tensor.unbind(0)

    def parts(self, weight: Tensor) -> Iterator[Part]:
        """Yield every expert as a part, with its slice of the weight (E, D, I)."""
        for expert, (weight_DI, seen) in enumerate(zip(self.split(weight), self.experts, strict=True)):
            observation = None if seen is None else seen.unpack(weight.device).about_zero()
            yield Part(weight_DI, observation, self.share(expert), f"expert {expert}")

    def joined(self, fits: Sequence[T], join: Callable[[Sequence[T]], T]) -> T:
        """Return the experts' fits, combined by `join`."""
        return join(fits)


def observed_from_arrays(arrays: Mapping[str, np.ndarray]) -> Observed:
    """Return the observation that `Observed.to_arrays` wrote, in its original class, and ignore other arrays."""
    kind = PackedExperts if "experts" in arrays else PackedObservation
    return kind.from_arrays(arrays)


class RoutedSum:
    """A running sum of the observations of a layer's experts over batches of tokens."""

    def __init__(self, num_experts: int) -> None:
        self._count = 0
        self._experts: list[ObservationSum | None] = [None] * num_experts

    def add(self, routed: Routed, input_bTD: Tensor) -> None:
        """Add the inputs of the experts' output projections and of the branch itself (b, T, D)."""
        x_NkI, input_ND = routed.x_bTkI.flatten(0, 1), input_bTD.flatten(0, 1)
        for expert, tokens_n, places_n in _reached(routed.experts_bTk.flatten(0, 1)):
            seen = self._experts[expert] = self._experts[expert] or ObservationSum()
            seen.add(x_NkI[tokens_n, places_n], input_ND[tokens_n])
        self._count += len(input_ND)

    def packed(self) -> PackedExperts:
        """Return the observations of all tokens so far."""
        experts = tuple(None if seen is None else seen.packed() for seen in self._experts)
        return PackedExperts(self._count, experts)


def _merge(one: PackedObservation | None, other: PackedObservation | None) -> PackedObservation | None:
    seen = [observed for observed in (one, other) if observed is not None]
    return reduce(PackedObservation.merge, seen) if seen else None


def _beginning_with(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin with a prefix, without the prefix in their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
