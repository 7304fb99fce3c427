r"""Sums and merges moments of activations (count, mean, centred scatter), the only thing that leaves a shard.

    scatter = sum_n (x_n - mean) (x_n - mean)^T

Batches are summed about a shift s near the mean, with r = sum_n (x_n - s):

    mean = s + r / n,      scatter = sum_n (x_n - s)(x_n - s)^T - r r^T / n

Two sets of moments merge exactly (Chan, Golub, LeVeque 1979). With delta = mean_b - mean_a and n = n_a + n_b:

    mean = mean_a + delta n_b / n,      scatter = scatter_a + scatter_b + delta delta^T n_a n_b / n

Centring matters: language models have features whose mean dwarfs their spread, and the spread would be lost in
the difference of two large uncentred sums.

The scatter is symmetric, so only its upper triangle is summed, sent and merged, as block rows.

Shapes: N tokens, P inputs of an output projection; a block row has p rows and q columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

# The triangle is computed in this many block rows. That is little more than half of the full product's work, and each
# block is still large enough for the GEMM to run at its full rate.
TRIANGLE_BLOCKS = 8

# In bfloat16, only a feature whose mean exceeds this many standard deviations is centred before the product. Nearly
# all its values lie within a factor of two of the mean, where subtraction is exact (Sterbenz 1974). Other features are
# centred after it, which costs the float32 sum at most a factor of this squared in precision.
CENTRED_DEVIATIONS = 8.0

# Rows that are converted to float64 at once: few enough for a CPU's cache, which makes the sums four times as fast.
ROWS_AT_ONCE = 256

CPU = torch.device("cpu")

T = TypeVar("T")


@dataclass(frozen=True)
class Moments:
    """Count, mean (P,) and covariance (P, P) of activation rows, for solves: float64, or float32 on a GPU."""

    count: int
    mean_P: Tensor
    covariance_PP: Tensor

    @classmethod
    def of(cls, x_NP: Tensor) -> "Moments":
        """Return the moments of the rows of `x_NP` (N, P), any floating dtype."""
        total = MomentSum()
        total.add(x_NP)
        return total.packed().unpack()

    @property
    def norm_P(self) -> Tensor:
        """The L2 norm over tokens of each uncentred column, shape (P,)."""
        return (self.count * (self.covariance_PP.diagonal() + self.mean_P.square())).clamp(min=0).sqrt()

    def about_zero(self) -> "Moments":
        """Return moments with mean 0 and E[x x^T] as the covariance, so that fits have no intercept."""
        second_PP = self.covariance_PP + torch.outer(self.mean_P, self.mean_P)
        return Moments(self.count, torch.zeros_like(self.mean_P), second_PP)

    def to(self, device: torch.device) -> "Moments":
        """Return the same moments on `device`, in that device's accumulation dtype."""
        precision = accumulation_dtype(device)
        return Moments(self.count, self.mean_P.to(device, precision), self.covariance_PP.to(device, precision))


@dataclass(frozen=True)
class PackedMoments:
    """Moments as sent between processes: count, mean (P,), and block rows (p, q) of the scatter's upper triangle.

    They are NumPy arrays because Ray shares those without a copy, while it copies tensors twice.
    """

    count: int
    mean_P: np.ndarray
    rows: tuple[np.ndarray, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the arrays in bytes."""
        return self.mean_P.nbytes + sum(row.nbytes for row in self.rows)

    def is_finite(self) -> bool:
        """Return whether no feature's mean or power is NaN or infinite."""
        return bool(np.isfinite(self.mean_P).all() and all(np.isfinite(row.diagonal()).all() for row in self.rows))

    def merge(self, other: "PackedMoments") -> "PackedMoments":
        """Return the moments of both sets of rows together (Chan et al. 1979)."""
        count = self.count + other.count
        delta_P = other.mean_P - self.mean_P
        weighted_P = delta_P * (self.count * other.count / count)
        rows = []
        for (start, stop), row, other_row in zip(_block_rows(len(delta_P)), self.rows, other.rows, strict=True):
            merged_pq = np.outer(weighted_P[start:stop], delta_P[start:])
            merged_pq += row
            merged_pq += other_row
            rows.append(merged_pq)
        return PackedMoments(count, self.mean_P + delta_P * (other.count / count), tuple(rows))

    def unpack(self, device: torch.device = CPU) -> Moments:
        """Return the moments for a solve on a device, as copies of the arrays."""
        precision = accumulation_dtype(device)
        # The arrays may be read-only views of shared memory.
        mean_P = torch.from_numpy(self.mean_P.copy()).to(device, precision)
        covariance_PP = mean_P.new_empty(len(mean_P), len(mean_P))
        for (start, stop), row in zip(_block_rows(len(mean_P)), self.rows, strict=True):
            block_pq = torch.from_numpy(row / self.count).to(device, precision)
            covariance_PP[start:stop, start:] = block_pq
            covariance_PP[start:, start:stop] = block_pq.T
        return Moments(self.count, mean_P, covariance_PP)


class MomentSum:
    """A running sum of moments over batches of rows; it keeps one triangle and nothing per token."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, x_NP: Tensor) -> None:
        """Add rows (N, P) of any floating dtype; bfloat16 products are exact and summed in float32."""
        if not self._count:
            self._begin(x_NP)
        shifted_NP = x_NP - self._shift_P.to(x_NP)
        self._residual_P += shifted_NP.sum(dim=0, dtype=torch.promote_types(x_NP.dtype, torch.float32))
        for (start, stop), row_pq in zip(_block_rows(x_NP.shape[1]), self._rows, strict=True):
            row_pq += _product(shifted_NP[:, start:stop].T, shifted_NP[:, start:])
        self._count += len(x_NP)

    def packed(self) -> PackedMoments:
        """Return the moments of all rows so far, ready to send; more rows can still be added."""
        offset_P = self._residual_P / self._count
        rows = tuple(
            torch.addr(row_pq, self._residual_P[start:stop], offset_P[start:], alpha=-1).cpu().numpy()
            for (start, stop), row_pq in zip(_block_rows(len(offset_P)), self._rows, strict=True)
        )
        mean_P = self._shift_P.to(offset_P) + offset_P
        return PackedMoments(self._count, mean_P.cpu().numpy(), rows)

    def _begin(self, x_NP: Tensor) -> None:
        """Take the shift from the first rows; it only has to be near the mean of all rows."""
        width, precision = x_NP.shape[1], accumulation_dtype(x_NP.device)
        self._shift_P = _shift(x_NP)
        self._residual_P = x_NP.new_zeros(width, dtype=precision)
        self._rows = [
            x_NP.new_zeros(stop - start, width - start, dtype=precision) for start, stop in _block_rows(width)
        ]


class SquaredSum:
    """A running sum of squares of each feature, in float64."""

    def __init__(self) -> None:
        self._total_F: Tensor | None = None

    def add(self, x_NF: Tensor) -> None:
        """Add rows (N, F) of any floating dtype."""
        if self._total_F is None:
            self._total_F = x_NF.new_zeros(x_NF.shape[1], dtype=torch.float64)
        for x_nF in x_NF.split(ROWS_AT_ONCE):
            # float32 can represent the values, but not all of their squares.
            self._total_F += x_nF.double().square_().sum(dim=0)

    def packed(self) -> np.ndarray:
        """Return the sum (F,) over all rows so far."""
        assert self._total_F is not None, "a stream without blocks has nothing to sum"
        return self._total_F.cpu().numpy()


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over tokens on `device`: float32 on a GPU, else float64."""
    return torch.float32 if device.type == "cuda" else torch.float64


def merge_tree(parts: Sequence[T], merge: Callable[[T, T], T]) -> T:
    """Merge parts pairwise in a balanced tree, whose shape depends only on their order, so the sum is reproducible.

    The parts are moments, or references to moments held elsewhere.
    """
    level = list(parts)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _shift(x_NP: Tensor) -> Tensor:
    """Return the shift (P,) to subtract from every row, in the rows' dtype."""
    if x_NP.dtype != torch.bfloat16:
        return x_NP.mean(dim=0)
    mean_P = x_NP.mean(dim=0, dtype=torch.float32)
    deviation_P = x_NP.float().std(dim=0, correction=0)
    return torch.where(mean_P.abs() > CENTRED_DEVIATIONS * deviation_P, mean_P, 0.0).to(x_NP.dtype)


def _product(left_pN: Tensor, right_Nq: Tensor) -> Tensor:
    """Return the product (p, q); for bfloat16, only the float32 sum rounds."""
    if left_pN.dtype != torch.bfloat16:
        return left_pN @ right_Nq
    if left_pN.device.type == "cuda":
        return torch.mm(left_pN, right_Nq, out_dtype=torch.float32)
    return left_pN.float() @ right_Nq.float()


def _block_rows(width: int) -> list[tuple[int, int]]:
    step = -(-width // TRIANGLE_BLOCKS)
    return [(start, min(start + step, width)) for start in range(0, width, step)]
