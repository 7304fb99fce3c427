r"""Recovers the module's output from the kept inputs by full ridge regression (the `gram` method).

The paper's line is the diagonal case. From the same covariance C of the inputs,

    W_new = W_S + (C_SS + d I)^-1 C_SR W_R,      bias = mu^T W - mu_S^T W_new,      d = .01 mean diag(C)

Shapes: P inputs of the output projection, S of them kept, R the rest, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimllm_ops.decide.elimination import factorise_with_ridge, ridge
from slimllm_ops.moments.projection import Projection


@dataclass(frozen=True)
class Refit:
    """The new weight (S, D) and bias (D,) of the kept inputs, and the unexplained fraction of the output's variance."""

    weight_SD: Tensor
    bias_D: Tensor
    relative_error: float

    def restore(self, weight_SD: Tensor) -> Tensor:
        """Return the new weight (S, D) that replaces the dense one."""
        return self.weight_SD.to(weight_SD)

    def cpu(self) -> "Refit":
        """Return the refit in the driver's memory, in float32, the dtype that layers compute in."""
        return Refit(self.weight_SD.float().cpu(), self.bias_D.float().cpu(), self.relative_error)


def refit(projection: Projection, kept_S: Tensor) -> Refit:
    """Fit the kept inputs to the full output.

    Args:
        projection: The dense `o_proj` or `down_proj`.
        kept_S: Indices of the inputs that stay.

    Raises:
        SolveError: The regularised covariance cannot be factorised.
    """
    moments, weight_PD = projection.moments, projection.weight_PD
    covariance_SS = projection.covariance_PP[kept_S[:, None], kept_S]
    image_SD = projection.image_PD[kept_S]
    factor_SS = factorise_with_ridge(covariance_SS, ridge(projection.covariance_PP))
    weight_SD = weight_PD[kept_S] + torch.cholesky_solve(projection.removed_image(kept_S), factor_SS)
    bias_D = moments.mean_P @ weight_PD - moments.mean_P[kept_S] @ weight_SD
    explained = (weight_SD * (2 * image_SD - covariance_SS @ weight_SD)).sum()
    total = float(projection.variance_D.sum())
    error = max(total - float(explained), 0.0) / total if total > 0 else 0.0
    return Refit(weight_SD, bias_D, error)
