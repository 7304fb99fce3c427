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


def eliminate(projection: Projection, num_units: int) -> Ranking:
    """Rank units by elimination; costs are what their errors add to the loss, in nats per token.

    Without the output's Fisher information, costs are squared errors per token, summed over the output dims.

    Raises:
        SolveError: The regularised covariance cannot be inverted.
    """
    if is_constant(projection.covariance_PP):
        # A bias recovers constant inputs fully, so removing them is free; the formula would charge for the ridge.
        return Ranking(tuple(range(num_units)), (0.0,) * num_units)
    inverse_PP = invert(projection)
    weight_PD = projection.loss_weight_PD
    if num_units < len(inverse_PP):
        return _eliminate_groups(inverse_PP, weight_PD.clone(), num_units)
    return _eliminate_single(inverse_PP, weight_PD @ weight_PD.T)


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


def _eliminate_single(inverse_PP: Tensor, gram_PP: Tensor) -> Ranking:
    r"""Eliminate single inputs in blocks, in the same order as one by one.

    The weights are needed only through gram = W W^T: err_c = gram_cc / A_cc. With u = A[:, c] / sqrt(A_cc) and
    v = W[c] / sqrt(A_cc), an elimination is A -= u u^T and W -= u v^T. A block keeps them as U (P, B), M = W V^T (P, B)
    and V V^T (B, B), all computed from columns of A and gram. At the end of the block,

        A -= U U^T,      gram -= M U^T + U M^T - U (V V^T) U^T
    """
    left_P = torch.arange(len(inverse_PP), device=inverse_PP.device)
    order, costs = [], []
    while len(left_P):
        chosen_B, costs_B, u_BP, m_BP, vv_BB = _eliminate_block(inverse_PP, gram_PP, min(BLOCK, len(left_P)))
        order.append(left_P[chosen_B])
        costs.append(costs_B)
        stay = torch.ones(len(left_P), dtype=torch.bool, device=left_P.device)
        stay[chosen_B] = False
        left_P, u_BP, m_BP = left_P[stay], u_BP[:, stay], m_BP[:, stay]
        # In place, so that only the old and the new matrix are in memory.
        inverse_PP = _square_of(inverse_PP, stay).addmm_(u_BP.T, u_BP, alpha=-1)
        half_BP = m_BP - 0.5 * vv_BB @ u_BP
        gram_PP = _square_of(gram_PP, stay).addmm_(half_BP.T, u_BP, alpha=-1).addmm_(u_BP.T, half_BP, alpha=-1)
    return Ranking(tuple(torch.cat(order).tolist()), tuple(torch.cat(costs).tolist()))


def _eliminate_block(inverse_PP: Tensor, gram_PP: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eliminate `size` inputs, and return their indices, their costs, and the block's U^T, M^T and V V^T."""
    u_BP = inverse_PP.new_zeros(size, len(inverse_PP))
    m_BP, vv_BB = torch.zeros_like(u_BP), inverse_PP.new_zeros(size, size)
    inverse_P, gram_P = inverse_PP.diagonal().clone(), gram_PP.diagonal().clone()
    chosen, costs = [], []
    for k in range(size):
        # The index stays a tensor on the device, so nothing here waits for a GPU. Rows stand for columns (symmetric).
        c = (gram_P / inverse_P).argmin().view(1)
        cost, root = (gram_P / inverse_P)[c], inverse_P[c].sqrt()
        u_k, m_k = u_BP[:k].index_select(1, c)[:, 0], m_BP[:k].index_select(1, c)[:, 0]
        new_vv = (m_k - vv_BB[:k, :k] @ u_k) / root
        u_P = (inverse_PP.index_select(0, c)[0] - u_k @ u_BP[:k]) / root
        # The new column of W V^T: first with W from the start of the block, then with W after k eliminations.
        m_P = (gram_PP.index_select(0, c)[0] - u_k @ m_BP[:k]) / root
        current_m_P = m_P - new_vv @ u_BP[:k]
        u_BP[k], m_BP[k] = u_P, m_P
        vv_BB[:k, k], vv_BB[k, :k], vv_BB[k, k] = new_vv, new_vv, cost[0]
        inverse_P = inverse_P - u_P.square()
        gram_P = gram_P - u_P * (2 * current_m_P - u_P * cost)
        # An eliminated input is never the cheapest again.
        inverse_P[c], gram_P[c] = 1.0, torch.inf
        chosen.append(c)
        costs.append(cost)
    return torch.cat(chosen), torch.cat(costs), u_BP, m_BP, vv_BB
