"""The peak of memory is that since it was reset."""

import torch

from slimllm_ops.timing.memory import read_peak, reset_peak

SIZE = 1 << 26


def test_the_peak_rises_with_what_is_held_and_is_forgotten() -> None:
    reset_peak()
    before = read_peak().process
    held = torch.ones(SIZE, dtype=torch.uint8)
    during = read_peak().process
    assert during - before > SIZE // 2
    del held
    assert read_peak().process - before > SIZE // 2
    reset_peak()
    assert read_peak().process < during - SIZE // 2
