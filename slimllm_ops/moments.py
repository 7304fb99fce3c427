r"""Moments of activations: count, mean and centred scatter, the only thing that leaves a shard.

    scatter = sum_n (x_n - mean) (x_n - mean)^T

Two sets of moments merge exactly (Chan, Golub, LeVeque 1979); with delta = mean_b - mean_a and n = n_a + n_b:

    mean = mean_a + delta n_b / n,      scatter = scatter_a + scatter_b + delta delta^T n_a n_b / n

Centring matters: language models have features whose mean dwarfs their spread, and the difference of two
large uncentred sums would lose what is left of it.

Shapes: N tokens, P inputs of an output projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

# Rows of a triangle are multiplied in this many block rows: near half of the full product's work, while each
# block stays large enough for the GEMM to run at its full rate.
TRIANGLE_BLOCKS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Moments:
    """Count, mean (P,) and centred scatter (P, P) of rows of activations, both float64 (float32 on GPU)."""

    count: int
    mean_P: Tensor
    scatter_PP: Tensor

    @classmethod
    def of(cls, x_NP: Tensor) -> "Moments":
        """Return the moments of the rows of `x_NP` (N, P), any floating dtype."""
        precision = accumulation_dtype(x_NP.device)
        mean_P = x_NP.to(precision).mean(dim=0)
        centred_NP = (x_NP.to(precision) - mean_P).to(torch.float32)
        return cls(len(x_NP), mean_P, symmetric_product(centred_NP).to(precision))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of rows together (Chan et al. 1979)."""
        count = self.count + other.count
        delta_P = other.mean_P - self.mean_P
        scatter_PP = self.scatter_PP + other.scatter_PP
        scatter_PP.addr_(delta_P, delta_P, alpha=self.count * other.count / count)
        return Moments(count, self.mean_P + delta_P * (other.count / count), scatter_PP)

    @property
    def covariance_PP(self) -> Tensor:
        """Covariance C = E[(x - mu)(x - mu)^T], shape (P, P)."""
        return self.scatter_PP / self.count

    @property
    def norm_P(self) -> Tensor:
        """L2 norm over tokens of each uncentred column, shape (P,)."""
        return (self.scatter_PP.diagonal() + self.count * self.mean_P.square()).clamp(min=0).sqrt()

    def to(self, device: torch.device) -> "Moments":
        """Return the same moments on `device`, in the precision that is summed in there."""
        precision = accumulation_dtype(device)
        return Moments(self.count, self.mean_P.to(device, precision), self.scatter_PP.to(device, precision))

    def to_numpy(self) -> "PackedMoments":
        """Return the moments as NumPy arrays for travelling: the triangle's block rows only."""
        scatter_PP = self.scatter_PP.cpu()
        rows = tuple(scatter_PP[start:stop, start:].numpy() for start, stop in _block_rows(len(scatter_PP)))
        return PackedMoments(self.count, self.mean_P.cpu().numpy(), rows)


@dataclass(frozen=True)
class PackedMoments:
    """Moments as they travel between processes: NumPy, and of the symmetric scatter the upper triangle only.

    Ray shares NumPy arrays without a copy, where it copies tensors twice.
    """

    count: int
    mean_P: np.ndarray
    rows: tuple[np.ndarray, ...]

    def unpack(self) -> Moments:
        """Return the moments again, on the CPU, in memory of their own."""
        mean_P = torch.from_numpy(self.mean_P.copy())
        scatter_PP = torch.empty(len(mean_P), len(mean_P), dtype=mean_P.dtype)
        for (start, stop), row in zip(_block_rows(len(mean_P)), self.rows, strict=True):
            # Received arrays are read-only views of shared memory: copied into the square at once.
            block = torch.from_numpy(np.array(row, copy=True))
            scatter_PP[start:stop, start:] = block
            scatter_PP[start:, start:stop] = block.T
        return Moments(self.count, mean_P, scatter_PP)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums over tokens are kept in on `device`: float64, but float32 on a GPU."""
    return torch.float32 if device.type == "cuda" else torch.float64


def symmetric_product(x_NP: Tensor) -> Tensor:
    """Return x^T x (P, P), computed by the block rows of its upper triangle and mirrored."""
    width = x_NP.shape[1]
    product_PP = x_NP.new_empty(width, width)
    for start, stop in _block_rows(width):
        row = x_NP[:, start:stop].T @ x_NP[:, start:]
        product_PP[start:stop, start:] = row
        product_PP[start:, start:stop] = row.T
    return product_PP


def merge_tree(parts: Sequence[T], merge: Callable[[T, T], T]) -> T:
    """Merge parts pairwise in a balanced tree whose order is theirs alone, so that the sum has one value.

    The parts are moments, or whatever stands for them: references to moments that lie elsewhere.
    """
    level = list(parts)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _block_rows(width: int) -> list[tuple[int, int]]:
    step = -(-width // TRIANGLE_BLOCKS)
    return [(start, min(start + step, width)) for start in range(0, width, step)]
