"""Sums over tokens that shards return alongside moments."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from slimllm_ops.moments.moments import accumulation_dtype
from slimllm_ops.moments.observation import Observed


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, kept as the sum and the number of tokens."""

    total: float
    count: int

    def merge(self, other: "Mean") -> "Mean":
        """Return the sum over both sets of tokens."""
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.count


@dataclass(frozen=True)
class SecondMoment:
    """E[g g^T] over tokens, kept as the sum (D, D) and the number of tokens."""

    total_DD: np.ndarray
    count: int

    @classmethod
    def of(cls, g_ND: Tensor) -> "SecondMoment":
        """Return the sum over rows (N, D), in the precision of moments."""
        g_ND = g_ND.float()
        return cls((g_ND.T @ g_ND).to(accumulation_dtype(g_ND.device)).cpu().numpy(), len(g_ND))

    def merge(self, other: "SecondMoment") -> "SecondMoment":
        """Return the sum over both sets of tokens."""
        return SecondMoment(self.total_DD + other.total_DD, self.count + other.count)

    @property
    def value(self) -> np.ndarray:
        """The mean, shape (D, D), in float32."""
        return (self.total_DD / self.count).astype(np.float32)


@dataclass(frozen=True)
class DensePass:
    """The measurements of one pass through a dense branch.

    Attributes:
        observed: The branch's moments.
        power: The squared norm of the hidden states after the branch.
        change: The squared norm of what the layer has added to the states so far; None if not measured.
    """

    observed: Observed
    power: Mean
    change: Mean | None = None

    def merge(self, other: "DensePass") -> "DensePass":
        """Return the pass over both sets of tokens."""
        change = None if self.change is None or other.change is None else self.change.merge(other.change)
        return DensePass(self.observed.merge(other.observed), self.power.merge(other.power), change)

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the moments cover all tokens; see `Observed.require_tokens`."""
        self.observed.require_tokens(num_tokens)
