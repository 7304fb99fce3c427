"""Sums over tokens that shards return beside moments."""

from dataclasses import dataclass

from slimllm_ops.moments.observation import Observed


@dataclass(frozen=True)
class Mean:
    """A sum over tokens, and the number of tokens."""

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
    """What a pass of a dense branch leaves.

    Attributes:
        observed: The branch's moments.
        power: The squared norm of the states after it.
        change: The squared norm of what the layer has added to the states so far; None where it is not measured.
    """

    observed: Observed
    power: Mean
    change: Mean | None = None

    def merge(self, other: "DensePass") -> "DensePass":
        """Return the pass over both sets of tokens."""
        change = None if self.change is None or other.change is None else self.change.merge(other.change)
        return DensePass(self.observed.merge(other.observed), self.power.merge(other.power), change)

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the moments are of all tokens; see `Observed.require_tokens`."""
        self.observed.require_tokens(num_tokens)
