"""What a branch's activations leave behind, in memory and as it travels between processes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.errors import MiscountError
from slimllm_ops.moments.moments import Moments, MomentSum, PackedMoments


@dataclass(frozen=True)
class Observation:
    """Moments of X, the input of a branch's output projection, and sums of squares (D,) of the branch's own input."""

    moments: Moments
    input_squares_D: Tensor

    def about_zero(self) -> "Observation":
        """Return the same with moments about zero, so that fits have no intercept."""
        return Observation(self.moments.about_zero(), self.input_squares_D)


@dataclass(frozen=True)
class PackedObservation:
    """An observation as it travels and merges, in NumPy."""

    moments: PackedMoments
    input_squares_D: np.ndarray
    # Squares of what the output projection put out and of what of it was added to the stream, summed; none where
    # the two are one.
    powers: tuple[float, float] = (0.0, 0.0)

    @property
    def num_bytes(self) -> int:
        """What travels, in bytes."""
        return self.moments.num_bytes + self.input_squares_D.nbytes

    def require_tokens(self, num_tokens: int, described: str) -> "PackedObservation":
        """Return the observation, which must be of so many tokens: no shard left out, none counted twice.

        Raises:
            MiscountError: it is of fewer, or of more.
        """
        if self.moments.count != num_tokens:
            raise MiscountError(
                f"{described}: the moments are of {self.moments.count} tokens where {num_tokens} were sent: "
                f"a share of the data was lost or counted twice, which is a bug worth reporting"
            )
        return self

    def is_finite(self) -> bool:
        """Return whether no feature's mean or power, of what was seen, is NaN or infinite."""
        return self.moments.is_finite() and bool(np.isfinite(self.input_squares_D).all())

    def merge(self, other: "PackedObservation") -> "PackedObservation":
        """Return the observation of both sets of tokens."""
        return PackedObservation(
            self.moments.merge(other.moments),
            self.input_squares_D + other.input_squares_D,
            (self.powers[0] + other.powers[0], self.powers[1] + other.powers[1]),
        )

    @property
    def gain(self) -> float:
        """What an error of the output projection's output is worth in the residual stream, in squares."""
        output, added = self.powers
        return added / output if output > 0 else 1.0

    def unpack(self, device: torch.device, with_bias: bool = True) -> Observation:
        """Return the observation for a decision, on a device; its moments are about zero if no bias is fitted."""
        squares_D = torch.from_numpy(self.input_squares_D.copy()).to(device)
        observed = Observation(self.moments.unpack(device), squares_D)
        return observed if with_bias else observed.about_zero()


class ObservationSum:
    """An observation of batches of tokens as they come."""

    def __init__(self) -> None:
        self._moments = MomentSum()
        self._squares_D: Tensor | None = None
        self._powers = (0.0, 0.0)

    def add(self, x_NP: Tensor, input_ND: Tensor) -> None:
        """Add what enters a branch's output projection (N, P), and what entered the branch (N, D); N may be (b, T)."""
        self._moments.add(x_NP.flatten(0, -2))
        # The square of what float32 holds need not be held by it.
        squares_D = input_ND.flatten(0, -2).double().square_().sum(dim=0)
        self._squares_D = squares_D if self._squares_D is None else self._squares_D + squares_D

    def add_powers(self, output: float, added: float) -> None:
        """Add the summed squares of what the output projection put out, and of what of it was added to the stream."""
        self._powers = (self._powers[0] + output, self._powers[1] + added)

    def packed(self) -> PackedObservation:
        """Return the observation of all tokens so far."""
        assert self._squares_D is not None, "a stream without blocks has nothing to observe"
        return PackedObservation(self._moments.packed(), self._squares_D.cpu().numpy(), self._powers)
