"""Sums over tokens that shards return alongside moments."""

from dataclasses import dataclass

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
