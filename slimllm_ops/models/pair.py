"""The two branches of a decoder layer, attention and MLP, as one value."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")


@dataclass(frozen=True)
class Pair(Generic[T]):
    """Something that the attention and the MLP of a layer each have; it iterates in that order."""

    attention: T
    mlp: T

    def __iter__(self) -> Iterator[T]:
        return iter((self.attention, self.mlp))

    def map(self, function: Callable[[T], U]) -> "Pair[U]":
        """Return the function's value for each of the two."""
        return Pair(function(self.attention), function(self.mlp))

    def join(self, other: "Pair[U]", function: Callable[[T, U], V]) -> "Pair[V]":
        """Return the function's value for each of the two and its counterpart in another pair."""
        return Pair(function(self.attention, other.attention), function(self.mlp, other.mlp))


# What plans, files and messages call the two.
MODULES = Pair("attention", "mlp")
