r"""Chooses which attention heads to remove by SlimLLM's similarity of the module's output (paper, section 3.2).

For output dim j, the covariance between the contributions of units a and b is

    K_j[a, b] = W_a[:, j]^T C_ab W_b[:, j]

The correlation of a kept set S with the full output, summed over the dims, is

    r_j(S) = sum_{a in S, b in all} K_j[a, b] / sqrt( sum_{a, b in S} K_j[a, b] * sum_{a, b in all} K_j[a, b] )
    similarity(S) = sum_j |r_j(S)|

Everything is computed from K, so a trial costs O(D), where raw activations would cost O(N D H).

The unit is a KV group: a key/value head with all of its query heads, which are adjacent in the input of `o_proj`.
In multi-head attention a group is one head, and this is exactly the paper's method.

Shapes: P = query heads x head_dim, D hidden size, H units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimllm_ops.moments.projection import Projection


@dataclass(frozen=True)
class HeadChoice:
    """The kept units in ascending order, and every unit's score; a higher score is more prunable."""

    kept: tuple[int, ...]
    kept_before_exchange: tuple[int, ...]
    scores_H: Tensor


def choose_heads(projection: Projection, *, num_units: int, num_removed: int) -> HeadChoice:
    """Drop the `num_removed` most prunable units, then exchange units if that raises the similarity.

    Args:
        projection: `o_proj`.
        num_units: Number of KV groups (of heads, in multi-head attention).
        num_removed: Number of units to remove, in [0, num_units - 1].
    """
    covariances = unit_covariances(projection, num_units)
    scores_H = leave_one_out_similarity(covariances)
    order = torch.argsort(scores_H, descending=True, stable=True).tolist()
    dropped, kept = order[:num_removed], order[num_removed:]
    exchanged = exchange(covariances, kept, dropped)
    return HeadChoice(tuple(sorted(exchanged)), tuple(sorted(kept)), scores_H)


def unit_covariances(projection: Projection, num_units: int) -> Tensor:
    """Return K (D, H, H): for each output dim, the covariance between the contributions of every two units."""
    covariance_PP = projection.covariance_PP
    width = len(covariance_PP) // num_units
    weight_HwD = projection.weight_PD.unflatten(0, (num_units, width))
    K_HHD = weight_HwD.new_empty(num_units, num_units, weight_HwD.shape[2])
    for a in range(num_units):
        rows_wHw = covariance_PP[a * width : (a + 1) * width, a * width :].unflatten(1, (-1, width))
        # Compute C_ab W_b for every b >= a at once, then the inner products of its columns with those of W_a.
        image_HwD = rows_wHw.transpose(0, 1) @ weight_HwD[a:]
        K_HHD[a, a:] = (image_HwD * weight_HwD[a]).sum(dim=1)
        K_HHD[a + 1 :, a] = K_HHD[a, a + 1 :]
    return K_HHD.permute(2, 0, 1)


def similarity(covariances_DHH: Tensor, kept: list[int]) -> float:
    """Return sum_j |r_j(S)| for the kept set S; it is D when nothing is lost."""
    with_all_D = covariances_DHH[:, kept].sum(dim=(1, 2))
    within_D = covariances_DHH[:, kept][:, :, kept].sum(dim=(1, 2))
    return float(_summed_correlation(with_all_D[:, None], within_D[:, None], covariances_DHH)[0])


def leave_one_out_similarity(covariances_DHH: Tensor) -> Tensor:
    """Return similarity(all - {i}) of every unit i, shape (H,)."""
    row_DH = covariances_DHH.sum(dim=2)
    total_D1 = row_DH.sum(dim=1, keepdim=True)
    within_DH = total_D1 - 2 * row_DH + covariances_DHH.diagonal(dim1=1, dim2=2)
    return _summed_correlation(total_D1 - row_DH, within_DH, covariances_DHH)


def exchange(covariances_DHH: Tensor, kept: list[int], dropped: list[int]) -> list[int]:
    """Try every dropped unit, in order, in every kept slot, and make its best exchange if that is an improvement.

    A unit that an exchange drops is not tried again (the paper's greedy search).
    """
    kept = list(kept)
    best = similarity(covariances_DHH, kept) if kept else 0.0
    for candidate in dropped:
        trials = _exchange_similarities(covariances_DHH, kept, candidate)
        slot = int(trials.argmax())
        if float(trials[slot]) > best:
            best = float(trials[slot])
            kept[slot] = candidate
    return kept


def _exchange_similarities(covariances_DHH: Tensor, kept: list[int], candidate: int) -> Tensor:
    """Return the similarity after `candidate` takes each kept slot, shape (len(kept),)."""
    row_DH = covariances_DHH.sum(dim=2)
    to_kept_DH = covariances_DHH[:, :, kept].sum(dim=2)
    with_all_D1 = row_DH[:, kept].sum(dim=1, keepdim=True)
    within_D1 = to_kept_DH[:, kept].sum(dim=1, keepdim=True)
    variance_DH = covariances_DHH.diagonal(dim1=1, dim2=2)
    # within(S - out + in) = within(S) - 2 K[out, S] + K[out, out] + 2 (K[in, S] - K[in, out]) + K[in, in]
    leaving_DS = variance_DH[:, kept] - 2 * to_kept_DH[:, kept]
    entering_DS = to_kept_DH[:, [candidate]] - covariances_DHH[:, candidate][:, kept]
    within_DS = within_D1 + leaving_DS + 2 * entering_DS + variance_DH[:, [candidate]]
    with_all_DS = with_all_D1 - row_DH[:, kept] + row_DH[:, [candidate]]
    return _summed_correlation(with_all_DS, within_DS, covariances_DHH)


def _summed_correlation(with_all_DX: Tensor, within_DX: Tensor, covariances_DHH: Tensor) -> Tensor:
    """Return sum_j |r_j| for each trial X; a constant output dim never loses anything, so its r is 1."""
    total_D1 = covariances_DHH.sum(dim=(1, 2))[:, None].clamp(min=0)
    spread_DX = (within_DX.clamp(min=0) * total_D1).sqrt()
    correlation_DX = torch.where(spread_DX > 0, with_all_DX.abs() / spread_DX, torch.zeros_like(spread_DX))
    return torch.where(total_D1 > 0, correlation_DX, torch.ones_like(correlation_DX)).sum(dim=0)
