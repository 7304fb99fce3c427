"""Channels chosen from moments match raw activations and the general eigenvalue problem."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from slimllm_ops.decide.channels import ChannelStatistics, channel_scores, choose_channels
from slimllm_ops.moments.moments import Moments
from slimllm_ops.moments.projection import Projection
from tests.slimllm_ops import naive
from tests.slimllm_ops.naive import projection_of, random_activations


def mlp(seed: int, width: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return an MLP's inner activations, its weight out, its input, and its weights in."""
    rng = np.random.default_rng(seed)
    x_NP, weight_PD = random_activations(seed, width=width)
    # Weights in of the size of their part in the score, so that no part of the score drowns the others.
    return x_NP, weight_PD, rng.normal(size=(200, 10)) + 1, [rng.normal(size=(width, 10)) for _ in range(2)]


def known(x_NP: np.ndarray, weight_PD: np.ndarray, input_ND: np.ndarray, inputs: list[np.ndarray]) -> ChannelStatistics:
    """Return what the code under test is given of the same MLP."""
    norm_D = torch.from_numpy(np.linalg.norm(input_ND, axis=0))
    return statistics_of(projection_of(x_NP, weight_PD), norm_D, [torch.from_numpy(weight) for weight in inputs])


def statistics_of(projection: Projection, norm_D: torch.Tensor, weights_PD: list[torch.Tensor]) -> ChannelStatistics:
    norm_P = projection.moments.norm_P
    return ChannelStatistics(projection.weight_PD, norm_P, projection.output_covariance_DD, norm_D, weights_PD)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_raw_activations(seed: int) -> None:
    activations = mlp(seed)
    np.testing.assert_allclose(channel_scores(known(*activations)), naive.channel_scores(*activations), rtol=1e-6)


def test_the_score_is_a_sum_over_the_projections_in_and_out() -> None:
    statistics = known(*mlp(0))
    whole = channel_scores(statistics)
    silent = channel_scores(replace(statistics, input_weights_PD=[]))
    gate, up = (
        channel_scores(replace(statistics, input_weights_PD=[weight_PD])) - silent
        for weight_PD in statistics.input_weights_PD
    )
    np.testing.assert_allclose(whole, silent + gate + up, rtol=1e-12)


@pytest.mark.parametrize(
    ("width", "num_removed", "keep_lowest", "tail"),
    [(24, 6, 0.0, 0), (24, 6, 0.1, 2), (100, 40, 0.01, 1), (50, 10, 0.05, 2), (70, 10, 0.05, 4), (48, 12, 0.01, 0)],
)
def test_the_published_tail_of_lowest_scores_stays(width: int, num_removed: int, keep_lowest: float, tail: int) -> None:
    # A tail of 2.5 is 2 and one of 3.5 is 4: half to even, as Python rounds.
    activations = mlp(1, width)
    choice = choose_channels(known(*activations), num_removed=num_removed, keep_lowest=keep_lowest)
    ascending = np.argsort(naive.channel_scores(*activations), kind="stable").tolist()
    expected = sorted(ascending[:tail] + ascending[tail + num_removed :])
    assert list(choice.kept) == expected


@pytest.mark.parametrize("num_removed", [0, 1, 17, 22, 23])
@pytest.mark.parametrize("keep_lowest", [0.0, 0.01, 0.3, 1.0])
def test_whatever_the_tail_as_many_go_as_were_asked_to(num_removed: int, keep_lowest: float) -> None:
    kept = choose_channels(known(*mlp(2)), num_removed=num_removed, keep_lowest=keep_lowest).kept
    assert len(set(kept)) == 24 - num_removed
    assert list(kept) == sorted(kept)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_constant_inputs_give_scores_that_are_numbers(value: float) -> None:
    _, weight_PD, input_ND, weights = mlp(3)
    statistics = known(np.full((50, 24), value), weight_PD, input_ND, weights)
    assert torch.isfinite(channel_scores(statistics)).all()


def test_an_output_dim_that_is_always_zero_gives_scores_that_are_those_of_raw_activations() -> None:
    x_NP, weight_PD, input_ND, weights = mlp(4)
    weight_PD[:, 3] = 0
    activations = (x_NP, weight_PD, input_ND, weights)
    np.testing.assert_allclose(channel_scores(known(*activations)), naive.channel_scores(*activations), rtol=1e-6)


def test_the_best_channel_stays_whatever_goes() -> None:
    torch.manual_seed(0)
    projection = Projection.of(Moments.of(torch.randn(200, 100)), torch.randn(6, 100))
    statistics = statistics_of(projection, torch.rand(6), [torch.randn(100, 6)])
    choice = choose_channels(statistics, num_removed=99, keep_lowest=0.01)
    assert choice.kept == (int(choice.scores_P.argmax()),)
