r"""Ranks units by backward elimination: repeatedly removes the cheapest one and refits the rest.

This is the optimal brain surgeon on groups of inputs of an output projection W (P, D). With C the covariance of the
inputs and A = (C + d I)^-1, removing group g and refitting the rest by least squares adds this squared error:

    err_g = tr( W_g^T (A_gg)^-1 W_g )

Remove the cheapest group, update W -= A[:, g] A_gg^-1 W_g and A -= A[:, g] A_gg^-1 A[g, :], and repeat. The path is
nested: one elimination serves every ratio, and the running sum of err_g is the module's error curve.

With the Fisher information F of the output, an error e of the output costs 1/2 e^T F e in place of |e|^2. So W stands
for W (F / 2)^(1/2), and err_g is in nats per token (`slimllm_ops/stream/sensitivity.py`).

Hassibi and Stork 1993; on groups as in ZipLM (Kurtic et al. 2023) and OSSCAR (Meng et al. 2024).

Shapes: P inputs, D hidden size, H groups of w inputs each, B eliminations per block.
"""

import torch
from torch import Tensor

from slimllm_ops.errors import SolveError
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking

RIDGE = 0.01
# Inputs are computed in float32; below this, a variance or mean square is indistinguishable from zero.
CONSTANT = torch.finfo(torch.float32).tiny ** 2
# Single channels are eliminated in blocks: only columns are updated within a block, and everything by GEMM at its end.
BLOCK = 128
# What a block adds to each G_cc, in units of rounding: rounding must make no cost negative.
FLOOR = 64


def eliminate(projection: Projection, num_units: int) -> Ranking:
    """Rank units by elimination; costs are what their errors add to the loss, in nats per token.

    Without the output's Fisher information, costs are squared errors per token, summed over the output dims.

    Raises:
        SolveError: The regularised covariance cannot be inverted.
    """
    if is_constant(projection.covariance_PP):
        # A bias recovers constant inputs fully, so removing them is free; the formula would charge for the ridge.
        return Ranking(tuple(range(num_units)), (0.0,) * num_units)
    weight_PD = projection.loss_weight_PD
    if num_units < len(weight_PD):
        return _eliminate_groups(invert(projection), weight_PD.clone(), num_units)
    both_2PP = weight_PD.new_empty(2, len(weight_PD), len(weight_PD))
    both_2PP[1] = invert(projection)
    torch.mm(weight_PD, weight_PD.T, out=both_2PP[0])
    return _eliminate_single(both_2PP)


def is_constant(covariance_PP: Tensor) -> bool:
    """Return whether inputs with this covariance are all constant."""
    return abs(float(covariance_PP.diagonal().mean())) <= CONSTANT


def ridge(covariance_PP: Tensor) -> float:
    """Return the ridge d = .01 mean diag(C), in squared units of the inputs; 1 if the inputs are constant."""
    return 1.0 if is_constant(covariance_PP) else RIDGE * float(covariance_PP.diagonal().mean())


def invert(projection: Projection) -> Tensor:
    """Return A = (C + d I)^-1, shape (P, P)."""
    return torch.cholesky_inverse(factorise_with_ridge(projection.covariance_PP, ridge(projection.covariance_PP)))


def factorise_with_ridge(covariance_PP: Tensor, d: float) -> Tensor:
    """Return the Cholesky factor of C + d I, without changing C.

    Raises:
        SolveError: C + d I is not positive definite.
    """
    regular_PP = covariance_PP.clone()
    regular_PP.diagonal().add_(d)
    return factorise(regular_PP)


def factorise(regular_PP: Tensor) -> Tensor:
    """Return the Cholesky factor of a regularised covariance.

    Raises:
        SolveError: It is not positive definite; the message gives the range of its eigenvalues.
    """
    factor_PP, info = torch.linalg.cholesky_ex(regular_PP)
    if int(info):
        if not regular_PP.isfinite().all():
            raise SolveError(
                f"the covariance of {len(regular_PP)} inputs holds NaN or infinity: the activations overflow "
                f"{regular_PP.dtype}, or the weights are damaged"
            )
        eigenvalues = torch.linalg.eigvalsh(regular_PP)
        raise SolveError(
            f"the covariance of {len(regular_PP)} inputs cannot be factorised (eigenvalues from "
            f"{float(eigenvalues[0]):.2g} to {float(eigenvalues[-1]):.2g}): calibrate on more tokens"
        )
    return factor_PP


def _eliminate_groups(inverse_PP: Tensor, weight_PD: Tensor, num_units: int) -> Ranking:
    """Eliminate groups one by one; they are wide enough for each update to be a matrix product."""
    width = len(inverse_PP) // num_units
    left, order, costs = list(range(num_units)), [], []
    while left:
        # Cholesky, since the blocks are positive definite, and batched LU solves never return in some builds of MKL.
        factors_Hww = torch.linalg.cholesky(torch.stack([_block(inverse_PP, g, g, width) for g in range(len(left))]))
        weight_HwD = weight_PD.unflatten(0, (len(left), width))
        solved_HwD = torch.cholesky_solve(weight_HwD, factors_Hww)
        errors_H = (weight_HwD * solved_HwD).sum(dim=(1, 2))
        cheapest = int(errors_H.argmin())
        order.append(left.pop(cheapest))
        costs.append(float(errors_H[cheapest]))
        rows = slice(cheapest * width, (cheapest + 1) * width)
        column_Pw = inverse_PP[:, rows]
        weight_PD = weight_PD - column_Pw @ solved_HwD[cheapest]
        inverse_PP = inverse_PP - column_Pw @ torch.cholesky_solve(column_Pw.T, factors_Hww[cheapest])
        stay = torch.ones(len(inverse_PP), dtype=torch.bool, device=inverse_PP.device)
        stay[rows] = False
        weight_PD, inverse_PP = weight_PD[stay], _square_of(inverse_PP, stay)
    return Ranking(tuple(order), tuple(costs))


def _block(matrix_PP: Tensor, row: int, column: int, width: int) -> Tensor:
    return matrix_PP[row * width : (row + 1) * width, column * width : (column + 1) * width]


def _square_of(matrix_PP: Tensor, stay_P: Tensor) -> Tensor:
    """Return the submatrix of the rows and columns that stay."""
    kept_S = stay_P.nonzero()[:, 0]
    return matrix_PP[kept_S[:, None], kept_S]


def _eliminate_single(both_2PP: Tensor) -> Ranking:
    r"""Eliminate single inputs in blocks, in the same order as one by one.

    The weights are needed only through G = W W^T: err_c = G_cc / A_cc. With a = A[:, c], g = G[:, c],
    k = G_cc / 2 A_cc and p = g - k a, an elimination is

        A -= a a^T / A_cc,      G -= (p a^T + a p^T) / A_cc

    A block keeps a / A_cc and p of its eliminations, and updates A and G by products at its end.

    Args:
        both_2PP: G and A; they are overwritten.
    """
    left_P = torch.arange(both_2PP.shape[1], device=both_2PP.device)
    order, costs = [], []
    while len(left_P):
        chosen_B, costs_B, p_BP, a_BP, scaled_BP = _eliminate_block(both_2PP, min(BLOCK, len(left_P)))
        order.append(left_P[chosen_B])
        costs.append(costs_B)
        stay = torch.ones(len(left_P), dtype=torch.bool, device=left_P.device)
        stay[chosen_B] = False
        left_P, p_BP, a_BP, scaled_BP = left_P[stay], p_BP[:, stay], a_BP[:, stay], scaled_BP[:, stay]
        both_2PP = _keep(both_2PP, stay)
        both_2PP[0].addmm_(p_BP.T, scaled_BP, alpha=-1).addmm_(scaled_BP.T, p_BP, alpha=-1)
        both_2PP[1].addmm_(a_BP.T, scaled_BP, alpha=-1)
    return Ranking(tuple(torch.cat(order).tolist()), tuple(torch.cat(costs).tolist()))


def _keep(both_2PP: Tensor, stay_P: Tensor) -> Tensor:
    """Move the rows and columns that stay to the front, one matrix after the other to save memory; return them."""
    num_left = int(stay_P.sum())
    for matrix_PP in both_2PP:
        matrix_PP[:num_left, :num_left] = _square_of(matrix_PP, stay_P)
    return both_2PP[:, :num_left, :num_left]


def _eliminate_block(both_2PP: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eliminate `size` inputs; return their indices, their costs, and p, a and a / A_cc of each (B, P).

    On a GPU, an elimination takes little but the time to launch its operations, so it has only eight. With s = a / A_cc
    of each elimination before it in the block, the columns of its c are

        g = G[:, c] - sum (p_c s + s_c p),      a = A[:, c] - sum a_c s

    `history` holds the parts s, p, s, a, 0, each of B rows, one for each elimination. The first two parts are the
    vectors of both sums. Column c of the second and third are the coefficients for g, and of the last two for a. Three
    more rows are -A_cc, 1 / k, -A_cc for every c: column c of these makes s, p and s from a, g and 0 in one operation.

    Args:
        both_2PP: G and A.
        size: B.
    """
    width = both_2PP.shape[2]
    history = both_2PP.new_zeros(5 * size + 3, width)
    parts, divisors_3P = history[: 5 * size].unflatten(0, (5, size)), history[5 * size :]
    # Rows 1 and 3 are -G_cc / 2 and -A_cc of the inputs that are left; an eliminated one gets the highest cost.
    rows_4P, gone_21 = torch.ones_like(history[:4]), both_2PP.new_tensor([[-torch.inf], [-1.0]])
    gram_P = both_2PP[0].diagonal().clamp(min=0)
    floor_P = FLOOR * torch.finfo(gram_P.dtype).eps * gram_P
    rows_4P[1], rows_4P[3] = -0.5 * (gram_P + floor_P), -both_2PP[1].diagonal()
    highest_B, chosen_B = both_2PP.new_empty(size), torch.empty(size, dtype=torch.int64, device=both_2PP.device)
    for k in range(size):
        # The index stays a tensor on the device, so nothing here waits for a GPU. Rows stand for columns (symmetric).
        c = chosen_B[k : k + 1]
        torch.div(rows_4P[3], rows_4P[:3], out=divisors_3P)
        torch.max(divisors_3P[1], 0, keepdim=True, out=(highest_B[k : k + 1], c))
        at_c = history.index_select(1, c)
        current_2P = parts[1::2, k]
        torch.index_select(both_2PP, 1, c, out=current_2P.unsqueeze(1))
        current_2P.addmm_(at_c[size : 5 * size].view(2, -1), history[: 2 * size], alpha=-1)
        parts[:3, k].addcdiv_(parts[3, k], at_c[5 * size :], value=-1)
        rows_4P[1::2].addcmul_(current_2P, parts[0, k])
        rows_4P[1::2].index_copy_(1, c, gone_21)
    inverse_B = parts[3].gather(1, chosen_B[:, None])[:, 0]
    costs_B = 2 / highest_B - floor_P[chosen_B] / inverse_B
    return chosen_B, costs_B, parts[1], parts[3], parts[0]
