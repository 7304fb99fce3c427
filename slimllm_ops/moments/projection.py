r"""Pairs an output projection with the moments of its input: what heads, channels and recovery all need.

    C = covariance of the input X (N, P),   image = C W,   variance_j = (W^T C W)_jj

Shapes: N tokens, P inputs, D hidden size. PyTorch keeps the weight as (D, P); here it is transposed.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimllm_ops.moments.moments import Moments

# The share of the identity in the Fisher information of an output (docs/method.md).
SHRINKAGE = 0.5


@dataclass(frozen=True, eq=False)
class Fisher:
    """The Fisher information F = E[g g^T] (D, D) of an output; the experts of a module share one."""

    matrix_DD: Tensor

    @cached_property
    def half_root_DD(self) -> Tensor:
        """(F / 2)^(1/2), up to a rotation.

        F is shrunk towards the multiple of the identity that has its trace (Ledoit and Wolf 2004), since it is known
        from a few tokens.
        """
        values_D, vectors_DD = torch.linalg.eigh(self.matrix_DD)
        shrunk_D = torch.lerp(values_D, values_D.mean(), SHRINKAGE).clamp(min=0)
        return vectors_DD * (shrunk_D / 2).sqrt()


@dataclass(frozen=True, eq=False)
class Projection:
    """`o_proj` or `down_proj`: the moments of its input and its weight (P, D), in one precision.

    Products with the covariance are cached: at P x P x D, they are most of a decision's cost.
    """

    moments: Moments
    weight_PD: Tensor
    # The Fisher information of the output; without it, errors count as they are.
    fisher: Fisher | None = None

    @classmethod
    def of(cls, moments: Moments, weight_DP: Tensor) -> "Projection":
        """Pair moments with the weight as PyTorch stores it, on the weight's device."""
        moments = moments.to(weight_DP.device)
        return cls(moments, weight_DP.T.to(moments.covariance_PP.dtype))

    @property
    def covariance_PP(self) -> Tensor:
        """The covariance C of the input."""
        return self.moments.covariance_PP

    @cached_property
    def image_PD(self) -> Tensor:
        """C W: the covariance of every input with every output dim."""
        return self.covariance_PP @ self.weight_PD

    @property
    def output_covariance_DD(self) -> Tensor:
        """W^T C W: the covariance of the output."""
        return self.weight_PD.T @ self.image_PD

    @property
    def loss_weight_PD(self) -> Tensor:
        """W (F / 2)^(1/2): squared errors of X times this are what the errors of X W add to the loss, in nats."""
        return self.weight_PD if self.fisher is None else self.weight_PD @ self.fisher.half_root_DD.to(self.weight_PD)

    def removed_image(self, kept_S: Tensor) -> Tensor:
        """Return C_SR W_R (S, D): the covariance of the kept inputs with the removed inputs' output."""
        stays_P = torch.zeros(len(self.weight_PD), dtype=torch.bool, device=kept_S.device)
        stays_P[kept_S] = True
        return self.covariance_PP[kept_S][:, ~stays_P] @ self.weight_PD[~stays_P]

    @cached_property
    def variance_D(self) -> Tensor:
        """The variance of every output dim; rounding can make a zero negative, so it is clamped at 0."""
        return (self.weight_PD * self.image_PD).sum(dim=0).clamp(min=0)
