r"""Recovers the module's output from the kept inputs by the paper's line per output dim (section 3.4).

With y = X W the full output and x = X_S W_S the output of the kept inputs,

    a_j = cov(x_j, y_j) / var(x_j),      b_j = E y_j - a_j E x_j

    cov_j = W_S[:, j]^T C[S, :] W[:, j],     var_j = W_S[:, j]^T C[S, S] W_S[:, j]

The new weight is a_j W_S[:, j], the new bias b_j. Attention and experts have these from the moments of X. An MLP has
them from sums over both outputs (`slimllm_ops.moments.outputs`).

Shapes: P inputs of the output projection, S of them kept, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimllm_ops.moments.outputs import OutputPairs
from slimllm_ops.moments.projection import Projection

# Below this fraction of the inputs' power, the variance of an output dim is only rounding: the dim is constant.
CONSTANT = 1e-12


@dataclass(frozen=True)
class Line:
    """The scale (D,) and bias (D,) of the output dims, and the unexplained fraction of the output's variance.

    With experts, the scales are (E, D), and the kept weights are those of the experts, concatenated.
    """

    scale_D: Tensor
    bias_D: Tensor
    relative_error: float

    def restore(self, weight_SD: Tensor) -> Tensor:
        """Return the new weight (S, D) of the kept inputs from their dense one."""
        scale_ED = self.scale_D.to(weight_SD).view(-1, 1, weight_SD.shape[1])
        return (weight_SD.unflatten(0, (len(scale_ED), -1)) * scale_ED).flatten(0, 1)

    def cpu(self) -> "Line":
        """Return the line in the driver's memory."""
        return Line(self.scale_D.cpu(), self.bias_D.cpu(), self.relative_error)


def fit_line(projection: Projection, kept_S: Tensor) -> Line:
    """Fit every output dim by a line in the output of the kept inputs; a constant dim keeps scale 1.

    Args:
        projection: The dense `o_proj` or `down_proj`.
        kept_S: Indices of the inputs that stay.
    """
    moments, weight_PD = projection.moments, projection.weight_PD
    weight_SD = weight_PD[kept_S]
    covariance_D = (weight_SD * projection.image_PD[kept_S]).sum(dim=0)
    kept_image_SD = projection.image_PD[kept_S] - projection.removed_image(kept_S)
    variance_D = (weight_SD * kept_image_SD).sum(dim=0)
    power_D = weight_SD.square().T @ (moments.norm_P[kept_S].square() / moments.count)
    mean_z_D, mean_y_D = moments.mean_P[kept_S] @ weight_SD, moments.mean_P @ weight_PD
    return _line(covariance_D, variance_D, power_D, projection.variance_D, mean_z_D, mean_y_D)


def fit_line_to_outputs(pairs: OutputPairs, power_D: Tensor) -> Line:
    """Fit every output dim by a line in the output of the kept inputs; a constant dim keeps scale 1.

    Args:
        pairs: Sums over the outputs of the kept and of all inputs.
        power_D: The power of the kept inputs in every output dim, sum_s E x_s^2 W_sj^2, in float64.
    """
    mean_z_D, mean_y_D, power_z_D, product_D, power_y_D = torch.from_numpy(pairs.sums_5D / pairs.count)
    if not pairs.intercept:
        mean_z_D = mean_y_D = torch.zeros_like(mean_z_D)
    covariance_D = product_D - mean_z_D * mean_y_D
    variance_z_D, variance_y_D = power_z_D - mean_z_D.square(), (power_y_D - mean_y_D.square()).clamp(min=0)
    return _line(covariance_D, variance_z_D, power_D, variance_y_D, mean_z_D, mean_y_D)


def _line(
    covariance_D: Tensor,
    variance_z_D: Tensor,
    power_D: Tensor,
    variance_y_D: Tensor,
    mean_z_D: Tensor,
    mean_y_D: Tensor,
) -> Line:
    """Return the line from z to y of every output dim; `power_D` says which variances are only rounding."""
    varies_D = variance_z_D > CONSTANT * power_D
    ones_D = torch.ones_like(variance_z_D)
    scale_D = torch.where(varies_D, covariance_D / torch.where(varies_D, variance_z_D, ones_D), ones_D)
    bias_D = mean_y_D - scale_D * mean_z_D
    error_D = variance_y_D - 2 * scale_D * covariance_D + scale_D.square() * variance_z_D
    return Line(scale_D, bias_D, _fraction(error_D, variance_y_D))


def _fraction(error_D: Tensor, variance_D: Tensor) -> float:
    """Return the summed error over the summed variance; 0 for a constant output, which loses nothing."""
    total = float(variance_D.sum())
    return max(float(error_D.sum()), 0.0) / total if total > 0 else 0.0
