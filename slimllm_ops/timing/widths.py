"""Times matrix products of several widths, to find those that a processor computes slowly."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

# Other programs only add time, so the least of a few rounds is a width's own.
ROUNDS = 10


def time_widths(widths: Iterable[int], hidden_size: int, num_tokens: int, dtype: torch.dtype) -> dict[int, float]:
    """Return the seconds of a multiply-accumulate for each width P of a branch: x (N, D) by (D, P), back by (P, D).

    The widths take turns, so that a disturbance meets all of them.

    Args:
        widths: The widths P.
        hidden_size: The width D of the residual stream.
        num_tokens: How many tokens N pass at once.
        dtype: The dtype of the weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_ND = torch.randn(num_tokens, hidden_size, dtype=dtype, device=device)
    # As nn.Linear stores them: (out, in).
    pairs = {
        width: (
            torch.randn(width, hidden_size, dtype=dtype, device=device),
            torch.randn(hidden_size, width, dtype=dtype, device=device),
        )
        for width in sorted(set(widths))
    }
    seconds: dict[int, list[float]] = {width: [] for width in pairs}
    for round_number in range(-1, ROUNDS):
        for width, (into_PD, back_DP) in pairs.items():
            spent = _time_products(x_ND, into_PD, back_DP)
            # The first round warms up.
            if round_number >= 0:
                seconds[width].append(spent)
    return {width: min(spent) / (2 * num_tokens * hidden_size * width) for width, spent in seconds.items()}


def _time_products(x_ND: Tensor, into_PD: Tensor, back_DP: Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(torch.nn.functional.linear(x_ND, into_PD), back_DP)
    if x_ND.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
