"""What a branch's activations leave behind, in memory and as it travels between processes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.moments import Moments, PackedMoments


@dataclass(frozen=True)
class Observation:
    """Moments of X, the input of a branch's output projection, and sums of squares (D,) of the branch's own input."""

    moments: Moments
    input_squares_D: Tensor

    def merge(self, other: "Observation") -> "Observation":
        """Return the observation of both sets of tokens."""
        return Observation(self.moments.merge(other.moments), self.input_squares_D + other.input_squares_D)


@dataclass(frozen=True)
class PackedObservation:
    """An observation in NumPy, of the symmetric scatter the upper triangle only."""

    moments: PackedMoments
    input_squares_D: np.ndarray

    @classmethod
    def of(cls, observation: Observation) -> "PackedObservation":
        """Pack an observation."""
        return cls(observation.moments.to_numpy(), observation.input_squares_D.cpu().numpy())

    def unpack(self, device: torch.device) -> Observation:
        """Return the observation again, on a device."""
        squares_D = torch.from_numpy(self.input_squares_D.copy()).to(device)
        return Observation(self.moments.unpack().to(device), squares_D)
