"""Tokens are sampled by their probability."""

import torch

from slimllm_ops.stream.sampling import sample


def test_tokens_are_sampled_by_their_probability() -> None:
    logits_V = torch.randn(9, generator=torch.Generator().manual_seed(0))
    uniform_N = torch.rand(40_000, generator=torch.Generator().manual_seed(1))
    sampled_N = sample(logits_V.expand(len(uniform_N), -1), uniform_N)
    found_V = torch.bincount(sampled_N, minlength=9) / len(uniform_N)
    torch.testing.assert_close(found_V, logits_V.softmax(dim=0), rtol=0, atol=0.01)


def test_the_largest_number_below_one_gives_the_last_token_that_is_possible() -> None:
    logits_NV = torch.tensor([[0.0, 0.0, -torch.inf]])
    below = torch.nextafter(torch.tensor([1.0]), torch.tensor([0.0]))
    assert sample(logits_NV, below).tolist() == [1]
    assert sample(logits_NV, torch.tensor([0.0])).tolist() == [0]
