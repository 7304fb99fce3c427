"""Holds a value for each of a decoder layer's two branches, attention and MLP."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")


@dataclass(frozen=True)
class Pair(Generic[T]):
    """A pair of values, one for a layer's attention and one for its MLP; it iterates in that order."""

    attention: T
    mlp: T

    def __iter__(self) -> Iterator[T]:
        return iter((self.attention, self.mlp))

    def map(self, function: Callable[[T], U]) -> "Pair[U]":
        """Return the pair of the function's results for each value."""
        return Pair(function(self.attention), function(self.mlp))

    def join(self, other: "Pair[U]", function: Callable[[T, U], V]) -> "Pair[V]":
        """Return the pair of the function's results for each value and its counterpart in another pair."""
        return Pair(function(self.attention, other.attention), function(self.mlp, other.mlp))


# The names of the two branches in plans, files and messages.
MODULES = Pair("attention", "mlp")
