r"""Mixtures of experts: which tokens reach which expert, and what they leave behind.

A router sends each token to k of E experts, with a weight r for each. What the branch adds is

    y = sum_e r_e x_e W_e

over the experts that the token was sent to, x_e being what enters the output projection W_e of expert e. With r_e
multiplied into it, X_e = r_e x_e, every expert's output projection is one like any other, over tokens of its own: what
is observed of each are the moments of X_e over the tokens that reached it.

Shapes: b blocks of a batch, T tokens of a block, N of all, D hidden size, E experts, k of them for a token, I channels
of an expert, S of them kept, n tokens of one expert.
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
    add_powers,
    gain_of,
    require_count,
)
from slimllm_ops.moments.states import States, StateStore

T = TypeVar("T")


class Routed(NamedTuple):
    """X of a batch, an expert's for each of a token's k places, and which experts those are."""

    x_bTkI: Tensor
    experts_bTk: Tensor


@torch.inference_mode()
def route(router: nn.Module, gate_up_ERD: Tensor, activation: nn.Module, input_bTD: Tensor) -> Routed:
    """Send tokens through the experts that a router chooses, up to their output projections.

    Args:
        router: gives tokens (N, D) their logits, their experts' weights (N, k), and which experts those are (N, k).
        gate_up_ERD: the experts' weights of gate and up, R = 2 I rows, one after the other.
        activation: what follows the gate.
        input_bTD: the tokens.
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
    """Return what the experts add together (b, T, D).

    Args:
        routed: what enters their output projections.
        weight_EDS: the weights of those.
        kept_ES: the channels of each expert that they take; None where they take all.
    """
    x_NkI, experts_Nk = routed.x_bTkI.flatten(0, 1), routed.experts_bTk.flatten(0, 1)
    output_ND = x_NkI.new_zeros(len(x_NkI), weight_EDS.shape[1])
    for expert, tokens_n, places_n in _reached(experts_Nk):
        x_nS = x_NkI[tokens_n, places_n]
        if kept_ES is not None:
            x_nS = x_nS[:, kept_ES[expert]]
        # A token reaches an expert once, so that nothing is added twice here, in any order.
        output_ND[tokens_n] += functional.linear(x_nS, weight_EDS[expert])
    return output_ND.unflatten(0, routed.x_bTkI.shape[:2])


def _reached(experts_Nk: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the experts that tokens reach, and of each the tokens (n,) and which of their places it has (n,)."""
    for expert in experts_Nk.unique().tolist():
        yield expert, *torch.where(experts_Nk == expert)


class RoutedStates:
    """What enters the experts' output projections, of a stream's batches in order, until a decision is made."""

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
    """The observations of a layer's experts in NumPy, as they travel and merge.

    Experts have no bias and get none, so their moments are unpacked about zero.

    Attributes:
        count: Tokens of the stream.
        experts: Each expert's observation, of the tokens that were sent to it; None without tokens.
        powers: Sums of squares of what the experts put out together, and of what of it is added to the stream.
    """

    count: int
    experts: tuple[PackedObservation | None, ...]
    powers: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PackedExperts":
        """Return the observations that `to_arrays` wrote; other arrays are ignored."""
        num_experts, count = arrays["experts"].tolist()
        output, added = arrays["powers"].tolist()
        experts = (_beginning_with(f"{expert}.", arrays) for expert in range(num_experts))
        return cls(
            count, tuple(PackedObservation.from_arrays(one) if one else None for one in experts), (output, added)
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the observations as named arrays: "0.count" is the count of expert 0."""
        arrays = {"experts": np.array([len(self.experts), self.count]), "powers": np.array(self.powers)}
        for expert, seen in enumerate(self.experts):
            if seen is not None:
                arrays |= {f"{expert}.{name}": array for name, array in seen.to_arrays().items()}
        return arrays

    @property
    def intercept(self) -> bool:
        """An expert's recovery never has an intercept."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return sum(seen.num_bytes for seen in self.experts if seen is not None)

    @property
    def idle(self) -> tuple[int, ...]:
        """The experts that no token was sent to."""
        return tuple(expert for expert, seen in enumerate(self.experts) if seen is None)

    def share(self, expert: int) -> float:
        """Return the fraction of the tokens that were sent to an expert."""
        seen = self.experts[expert]
        return 0.0 if seen is None else seen.moments.count / self.count

    @property
    def gain(self) -> float:
        """What an error of the experts' output is worth in the residual stream, in squares."""
        return gain_of(self.powers)

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the observations are of `num_tokens` tokens.

        Raises:
            MiscountError: They are of fewer, or of more.
        """
        require_count(self.count, num_tokens)

    def is_finite(self) -> bool:
        """Return whether no expert has seen NaN or infinity."""
        return all(seen.is_finite() for seen in self.experts if seen is not None)

    def merge(self, other: "PackedExperts") -> "PackedExperts":
        """Return the observations of both sets of tokens."""
        merged = tuple(map(_merge, self.experts, other.experts))
        return PackedExperts(self.count + other.count, merged, add_powers(self.powers, other.powers))

    def with_intercept(self, intercept: bool) -> "PackedExperts":
        """Return the same observations: experts have no intercept either way."""
        return self

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Cut a stored tensor of all experts (E, ...) into each one's."""
        return tensor.unbind(0)

    def parts(self, weight: Tensor) -> Iterator[Part]:
        """Yield every expert as a part, with its weight from those of all (E, D, I)."""
        for expert, (weight_DI, seen) in enumerate(zip(self.split(weight), self.experts, strict=True)):
            observation = None if seen is None else seen.unpack(weight.device).about_zero()
            yield Part(weight_DI, observation, self.share(expert), f"expert {expert}")

    def joined(self, fits: Sequence[T], join: Callable[[Sequence[T]], T]) -> T:
        """Return the experts' fits, joined by `join`."""
        return join(fits)


def observed_from_arrays(arrays: Mapping[str, np.ndarray]) -> Observed:
    """Return the observation that `Observed.to_arrays` wrote, of the kind that it was; other arrays are ignored."""
    kind = PackedExperts if "experts" in arrays else PackedObservation
    return kind.from_arrays(arrays)


class RoutedSum:
    """Observations of a layer's experts, of batches of tokens as they come."""

    def __init__(self, num_experts: int) -> None:
        self._count = 0
        self._experts: list[ObservationSum | None] = [None] * num_experts
        self._powers = (0.0, 0.0)

    def add(self, routed: Routed, input_bTD: Tensor) -> None:
        """Add what enters the experts' output projections, and what entered the branch (b, T, D)."""
        x_NkI, input_ND = routed.x_bTkI.flatten(0, 1), input_bTD.flatten(0, 1)
        for expert, tokens_n, places_n in _reached(routed.experts_bTk.flatten(0, 1)):
            seen = self._experts[expert] = self._experts[expert] or ObservationSum()
            seen.add(x_NkI[tokens_n, places_n], input_ND[tokens_n])
        self._count += len(input_ND)

    def add_powers(self, output: float, added: float) -> None:
        """Add the summed squares of what the experts put out together, and of what of it was added to the stream."""
        self._powers = add_powers(self._powers, (output, added))

    def packed(self) -> PackedExperts:
        """Return the observations of all tokens so far."""
        experts = tuple(None if seen is None else seen.packed() for seen in self._experts)
        return PackedExperts(self._count, experts, self._powers)


def _merge(one: PackedObservation | None, other: PackedObservation | None) -> PackedObservation | None:
    seen = [observed for observed in (one, other) if observed is not None]
    return reduce(PackedObservation.merge, seen) if seen else None


def _beginning_with(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
