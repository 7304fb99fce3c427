r"""Mixtures of experts: which tokens reach which expert, and what they leave behind.

A router sends each token to k of E experts, with a weight r for each. What the branch adds is

    y = sum_e r_e x_e W_e

over the experts that the token was sent to, x_e being what enters the output projection W_e of expert e. With r_e
multiplied into it, X_e = r_e x_e, every expert's output projection is one like any other, over tokens of its own: what
is observed of each are the moments of X_e over the tokens that reached it.

Shapes: b blocks of a batch, T tokens of a block, N of all, D hidden size, E experts, k of them for a token, I channels
of an expert, S of them kept, n tokens of one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimllm_ops.errors import MiscountError
from slimllm_ops.moments.observation import ObservationSum, PackedObservation
from slimllm_ops.moments.states import States, StateStore


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
    """The observations of a layer's experts as they travel and merge; None of one that no token was sent to."""

    count: int
    experts: tuple[PackedObservation | None, ...]
    powers: tuple[float, float] = (0.0, 0.0)

    @property
    def num_bytes(self) -> int:
        """What travels, in bytes."""
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
        output, added = self.powers
        return added / output if output > 0 else 1.0

    def require_tokens(self, num_tokens: int, described: str) -> "PackedExperts":
        """Return the observations, which must be of so many tokens: no shard left out, none counted twice.

        Raises:
            MiscountError: they are of fewer, or of more.
        """
        if self.count != num_tokens:
            raise MiscountError(
                f"{described}: the experts' moments are of {self.count} tokens where {num_tokens} were sent: "
                f"a share of the data was lost or counted twice, which is a bug worth reporting"
            )
        return self

    def is_finite(self) -> bool:
        """Return whether no expert has seen what is NaN or infinite."""
        return all(seen.is_finite() for seen in self.experts if seen is not None)

    def merge(self, other: "PackedExperts") -> "PackedExperts":
        """Return the observations of both sets of tokens."""
        powers = (self.powers[0] + other.powers[0], self.powers[1] + other.powers[1])
        merged = tuple(map(_merge, self.experts, other.experts))
        return PackedExperts(self.count + other.count, merged, powers)


# What a branch leaves behind: of an MLP of experts, an observation of each.
Observed = PackedObservation | PackedExperts


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
        self._powers = (self._powers[0] + output, self._powers[1] + added)

    def packed(self) -> PackedExperts:
        """Return the observations of all tokens so far."""
        experts = tuple(None if seen is None else seen.packed() for seen in self._experts)
        return PackedExperts(self._count, experts, self._powers)


def _merge(one: PackedObservation | None, other: PackedObservation | None) -> PackedObservation | None:
    seen = [observed for observed in (one, other) if observed is not None]
    return reduce(PackedObservation.merge, seen) if seen else None
