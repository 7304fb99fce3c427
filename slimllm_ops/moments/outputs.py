r"""Sums what the published method needs of an MLP's output projection, without the P x P moments of its input.

With X the input of the projection and Y = X W its output, scores need the norms of X's columns and the moments of Y.
Once the channels S are chosen, the line of every output dim needs five sums over tokens, of z = X_S W_S beside y:

    sum z,   sum y,   sum z^2,   sum z y,   sum y^2

Neither y nor z has the projection's bias.

Shapes: N tokens, D hidden size, P inputs of the output projection.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.moments.moments import ROWS_AT_ONCE, Moments, MomentSum, PackedMoments, SquaredSum
from slimllm_ops.moments.observation import require_count


@dataclass(frozen=True)
class OutputObservation:
    """The activations of an MLP as its scores need them, in the form that is sent and merged.

    Attributes:
        outputs: Moments of Y (N, D).
        x_squares_P: Sums of squares of X, in float64.
        input_squares_D: Sums of squares of the MLP's input, in float64.
        intercept: Whether recovery may fit an intercept. If not, moments are unpacked about zero.
    """

    outputs: PackedMoments
    x_squares_P: np.ndarray
    input_squares_D: np.ndarray
    intercept: bool = True

    @property
    def num_bytes(self) -> int:
        """The size of the arrays in bytes."""
        return self.outputs.num_bytes + self.x_squares_P.nbytes + self.input_squares_D.nbytes

    def merge(self, other: "OutputObservation") -> "OutputObservation":
        """Return the observation of both sets of tokens."""
        return replace(
            self,
            outputs=self.outputs.merge(other.outputs),
            x_squares_P=self.x_squares_P + other.x_squares_P,
            input_squares_D=self.input_squares_D + other.input_squares_D,
        )

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the moments cover `num_tokens` tokens.

        Raises:
            MiscountError: They cover fewer or more tokens.
        """
        require_count(self.outputs.count, num_tokens)

    def is_finite(self) -> bool:
        """Return whether no feature's mean or power is NaN or infinite."""
        squares = (self.x_squares_P, self.input_squares_D)
        return self.outputs.is_finite() and all(bool(np.isfinite(one).all()) for one in squares)

    def output_moments(self, device: torch.device) -> Moments:
        """Return the moments of Y on a device; about zero, if recovery may fit no intercept."""
        moments = self.outputs.unpack(device)
        return moments if self.intercept else moments.about_zero()


class OutputSum:
    """A running sum of an `OutputObservation` over batches of tokens.

    Args:
        intercept: Whether recovery may fit an intercept.
    """

    def __init__(self, intercept: bool) -> None:
        self._outputs = MomentSum()
        self._x_squares, self._input_squares = SquaredSum(), SquaredSum()
        self._intercept = intercept

    def add(self, x: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        """Add the tokens' X (..., P), the MLP's input (..., D) and Y (..., D)."""
        self._outputs.add(outputs.flatten(0, -2))
        for total, states in zip((self._x_squares, self._input_squares), (x, inputs), strict=True):
            total.add(states.flatten(0, -2))

    def packed(self) -> OutputObservation:
        """Return the observation of all tokens so far."""
        squares = (self._x_squares.packed(), self._input_squares.packed())
        return OutputObservation(self._outputs.packed(), *squares, self._intercept)


@dataclass(frozen=True)
class OutputPairs:
    """Sums over tokens of the kept channels' output z beside the full output y.

    Attributes:
        count: Number of tokens.
        sums_5D: Sums of z, y, z^2, z y and y^2, in float64.
        intercept: Whether the line may have an intercept. If not, means count as zero.
    """

    count: int
    sums_5D: np.ndarray
    intercept: bool = True

    @classmethod
    def of(cls, kept_ND: Tensor, full_ND: Tensor, intercept: bool = True) -> "OutputPairs":
        """Return the sums over the rows of two outputs."""
        sums_5D = full_ND.new_zeros(5, full_ND.shape[1], dtype=torch.float64)
        for kept_nD, full_nD in zip(kept_ND.split(ROWS_AT_ONCE), full_ND.split(ROWS_AT_ONCE), strict=True):
            z_nD, y_nD = kept_nD.double(), full_nD.double()
            for sum_D, term_nD in zip(sums_5D, (z_nD, y_nD, z_nD * z_nD, z_nD * y_nD, y_nD * y_nD), strict=True):
                sum_D += term_nD.sum(dim=0)
        return cls(len(kept_ND), sums_5D.cpu().numpy(), intercept)

    def merge(self, other: "OutputPairs") -> "OutputPairs":
        """Return the sums over both sets of tokens."""
        return replace(self, count=self.count + other.count, sums_5D=self.sums_5D + other.sums_5D)

    def require_tokens(self, num_tokens: int) -> None:
        """Check that the sums cover `num_tokens` tokens.

        Raises:
            MiscountError: They cover fewer or more tokens.
        """
        require_count(self.count, num_tokens)

    def is_finite(self) -> bool:
        """Return whether no sum is NaN or infinite."""
        return bool(np.isfinite(self.sums_5D).all())
