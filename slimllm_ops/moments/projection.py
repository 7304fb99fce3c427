r"""An output projection seen through the moments of its input: what heads, channels and recovery all need.

    C = covariance of the input X (N, P),   image = C W,   variance_j = (W^T C W)_jj

Shapes: N tokens, P inputs, D hidden size. PyTorch keeps the weight as (D, P); here it is transposed.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimllm_ops.moments.moments import Moments


@dataclass(frozen=True, eq=False)
class Projection:
    """`o_proj` or `down_proj`: the moments of its input and its weight (P, D), in one precision.

    The products with the covariance are cached, since P x P x D is what a decision costs.
    """

    moments: Moments
    weight_PD: Tensor

    @classmethod
    def of(cls, moments: Moments, weight_DP: Tensor) -> "Projection":
        """Pair moments with the weight as PyTorch has it, on the weight's device."""
        moments = moments.to(weight_DP.device)
        return cls(moments, weight_DP.T.to(moments.covariance_PP.dtype))

    @property
    def covariance_PP(self) -> Tensor:
        """Covariance C of the input."""
        return self.moments.covariance_PP

    @cached_property
    def image_PD(self) -> Tensor:
        """C W: the covariance of every input with every output dim."""
        return self.covariance_PP @ self.weight_PD

    def removed_image(self, kept_S: Tensor) -> Tensor:
        """Return C_SR W_R (S, D): the covariance of the kept inputs with what the removed ones put out."""
        stays_P = torch.zeros(len(self.weight_PD), dtype=torch.bool, device=kept_S.device)
        stays_P[kept_S] = True
        return self.covariance_PP[kept_S][:, ~stays_P] @ self.weight_PD[~stays_P]

    @cached_property
    def variance_D(self) -> Tensor:
        """Variance of every output dim; what rounding leaves of none may be below 0, and is none."""
        return (self.weight_PD * self.image_PD).sum(dim=0).clamp(min=0)
