"""Collects statistics of a branch's activations, and packs them to be sent between processes.

The rest of the package uses the protocol `Observed`. A plain branch has one output projection and is observed by a
`PackedObservation`. A mixture of experts has one output projection per expert and is observed by a `PackedExperts`
(`slimllm_ops.moments.routing`). Solves see both as a list of parts; a plain branch has a single part.

Shapes: N tokens, D hidden size, P inputs of an output projection.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.errors import MiscountError, SolveError
from slimllm_ops.moments.moments import Moments, MomentSum, PackedMoments, SquaredSum
from slimllm_ops.moments.projection import Projection

T = TypeVar("T")


@dataclass(frozen=True)
class Observation:
    """Moments of X, the input of a branch's output projection, and sums of squares (D,) of the branch's input."""

    moments: Moments
    input_squares_D: Tensor

    def about_zero(self) -> "Observation":
        """Return the same observation with moments about zero, so that fits have no intercept."""
        return Observation(self.moments.about_zero(), self.input_squares_D)


@dataclass(frozen=True, eq=False)
class Part:
    """One output projection of a module: the module's only one, or one expert's.

    Attributes:
        weight_DP: The weight, as PyTorch stores it.
        observation: The observation of its input; None for an expert that received no tokens.
        share: The fraction of tokens that pass through it.
        name: The name used in errors; empty for the only part of a module.
    """

    weight_DP: Tensor
    observation: Observation | None
    share: float = 1.0
    name: str = ""

    @cached_property
    def projection(self) -> Projection | None:
        """The weight paired with the moments of its input; None without tokens."""
        return None if self.observation is None else Projection.of(self.observation.moments, self.weight_DP)

    @property
    def output_variance(self) -> float:
        """The variance of the output, summed over its dims; 0 without tokens."""
        return 0.0 if self.projection is None else float(self.projection.variance_D.sum())

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Prefix the part's name to an error of the solve inside.

        Raises:
            SolveError: The solve inside failed.
        """
        try:
            yield
        except SolveError as error:
            raise SolveError(f"{self.name}: {error}" if self.name else str(error)) from None


class Counted(Protocol):
    """Moments that know how many tokens they are of."""

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the moments are of `num_tokens` tokens.

        Raises:
            MiscountError: They are of fewer, or of more.
        """


class Observed(Protocol):
    """A branch's observation in the form that is sent, merged and stored."""

    @property
    def intercept(self) -> bool:
        """Whether recovery may fit an intercept. If not, moments are unpacked about zero."""

    @property
    def num_bytes(self) -> int:
        """The size of the arrays in bytes."""

    @property
    def idle(self) -> tuple[int, ...]:
        """The parts that received no tokens."""

    def merge(self, other: Self) -> Self:
        """Return the observation of both sets of tokens."""

    def with_intercept(self, intercept: bool) -> Self:
        """Return the same observation, for recovery with or without an intercept."""

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the observation covers `num_tokens` tokens: no shard is missing or counted twice.

        Raises:
            MiscountError: It covers fewer or more tokens.
        """

    def is_finite(self) -> bool:
        """Return whether the observation is free of NaN and infinity."""

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Split a stored tensor of the module into one tensor per part."""

    def parts(self, weight: Tensor) -> Iterator[Part]:
        """Yield the module's parts one at a time, unpacked on the weight's device.

        Args:
            weight: The output projection's weight: (D, P), or (E, D, P) with experts.
        """

    def joined(self, fits: Sequence[T], join: Callable[[Sequence[T]], T]) -> T:
        """Return one fit for the module: the only part's fit, or several fits combined by `join`."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the observation as named arrays, without the `intercept` setting."""


@dataclass(frozen=True)
class PackedObservation:
    """A plain branch's observation in NumPy, in the form that is sent and merged.

    Attributes:
        moments: Moments of X.
        input_squares_D: Sums of squares of the branch's input.
        intercept: Whether recovery may fit an intercept.
    """

    moments: PackedMoments
    input_squares_D: np.ndarray
    intercept: bool = True

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PackedObservation":
        """Return the observation that `to_arrays` wrote, and ignore other arrays."""
        num_rows = sum(name.startswith("scatter.") for name in arrays)
        rows = tuple(arrays[f"scatter.{number}"] for number in range(num_rows))
        moments = PackedMoments(int(arrays["count"][0]), arrays["mean"], rows)
        return cls(moments, arrays["input_squares"])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the observation as named arrays."""
        arrays = {
            "count": np.array([self.moments.count]),
            "mean": self.moments.mean_P,
            "input_squares": self.input_squares_D,
        }
        return arrays | {f"scatter.{number}": row for number, row in enumerate(self.moments.rows)}

    @property
    def num_bytes(self) -> int:
        """The size of the arrays in bytes."""
        return self.moments.num_bytes + self.input_squares_D.nbytes

    @property
    def idle(self) -> tuple[int, ...]:
        """Always empty: every token passes through the only part."""
        return ()

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the moments cover `num_tokens` tokens.

        Raises:
            MiscountError: They cover fewer or more tokens.
        """
        require_count(self.moments.count, num_tokens)

    def is_finite(self) -> bool:
        """Return whether no feature's mean or power is NaN or infinite."""
        return self.moments.is_finite() and bool(np.isfinite(self.input_squares_D).all())

    def merge(self, other: "PackedObservation") -> "PackedObservation":
        """Return the observation of both sets of tokens."""
        return replace(
            self,
            moments=self.moments.merge(other.moments),
            input_squares_D=self.input_squares_D + other.input_squares_D,
        )

    def with_intercept(self, intercept: bool) -> "PackedObservation":
        """Return the same observation, for recovery with or without an intercept."""
        return replace(self, intercept=intercept)

    def unpack(self, device: torch.device) -> Observation:
        """Return the observation on a device, ready for a solve; without an intercept, its moments are about zero."""
        squares_D = torch.from_numpy(self.input_squares_D.copy()).to(device)
        observed = Observation(self.moments.unpack(device), squares_D)
        return observed if self.intercept else observed.about_zero()

    def split(self, tensor: Tensor) -> tuple[Tensor]:
        """Return the stored tensor unsplit, for the only part."""
        return (tensor,)

    def parts(self, weight: Tensor) -> Iterator[Part]:
        """Yield the only part, with its weight (D, P)."""
        yield Part(weight, self.unpack(weight.device))

    def joined(self, fits: Sequence[T], join: Callable[[Sequence[T]], T]) -> T:
        """Return the only part's fit."""
        (fit,) = fits
        return fit


class ObservationSum:
    """A running sum of an observation over batches of tokens."""

    def __init__(self) -> None:
        self._moments = MomentSum()
        self._squares = SquaredSum()

    def add(self, x_NP: Tensor, input_ND: Tensor) -> None:
        """Add the input of a branch's output projection (N, P) and of the branch itself (N, D); N may be (b, T)."""
        self._moments.add(x_NP.flatten(0, -2))
        self._squares.add(input_ND.flatten(0, -2))

    def packed(self) -> PackedObservation:
        """Return the observation of all tokens so far."""
        return PackedObservation(self._moments.packed(), self._squares.packed())


def require_count(found: int, num_tokens: int) -> None:
    """Check that moments cover as many tokens as were sent.

    Raises:
        MiscountError: They cover fewer or more tokens.
    """
    if found != num_tokens:
        raise MiscountError(
            f"the moments cover {found} tokens, but {num_tokens} were sent: "
            f"some data was lost or counted twice, which is a bug worth reporting"
        )


def require_tokens(observed: Counted, num_tokens: int, label: str) -> None:
    """Check that moments are of `num_tokens` tokens; the error begins with a label, the layer and module.

    Raises:
        MiscountError: They are of fewer, or of more.
    """
    try:
        observed.require_tokens(num_tokens)
    except MiscountError as error:
        raise MiscountError(f"{label}: {error}") from None
