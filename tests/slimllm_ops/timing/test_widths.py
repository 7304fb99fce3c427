"""Each width is timed once a round, in turn with the others, and has its time per multiply-accumulate."""

import pytest
import torch

from slimllm_ops.timing import widths
from slimllm_ops.timing.widths import ROUNDS, time_widths


def test_widths_take_turns_and_times_are_of_one_multiply_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def time_products(x_ND: torch.Tensor, into_PD: torch.Tensor, back_DP: torch.Tensor) -> float:
        assert x_ND.shape[1] == into_PD.shape[1] == back_DP.shape[0]
        timed.append(len(into_PD))
        return 2.0 * len(into_PD)

    monkeypatch.setattr(widths, "_time_products", time_products)
    seconds = time_widths((5, 3, 3), hidden_size=4, num_tokens=10, dtype=torch.float32)
    assert timed == [3, 5] * (ROUNDS + 1)
    assert seconds == {3: pytest.approx(1 / 40), 5: pytest.approx(1 / 40)}


def test_products_take_time() -> None:
    assert all(spent > 0 for spent in time_widths((8, 9), 16, 4, torch.float32).values())
