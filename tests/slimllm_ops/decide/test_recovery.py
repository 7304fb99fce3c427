"""The line fitted to every output dim matches polynomial fits of raw outputs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from slimllm_ops.decide.recovery import Line, fit_line, fit_line_to_outputs
from slimllm_ops.moments.outputs import OutputPairs
from tests.slimllm_ops import naive
from tests.slimllm_ops.naive import projection_of, random_activations

KEPT = [[0], [1, 4, 20], list(range(12)), list(range(0, 24, 2))]


def fit_to_moments(x_NP: np.ndarray, weight_PD: np.ndarray, kept: list[int]) -> Line:
    return fit_line(projection_of(x_NP, weight_PD), torch.tensor(kept))


def fit_to_outputs(x_NP: np.ndarray, weight_PD: np.ndarray, kept: list[int]) -> Line:
    """Fit as an MLP is fitted: to sums over both outputs, which two shards made."""
    z_ND, y_ND = torch.from_numpy(x_NP[:, kept] @ weight_PD[kept]), torch.from_numpy(x_NP @ weight_PD)
    one, other = (OutputPairs.of(z_ND[rows], y_ND[rows]) for rows in (slice(0, 70), slice(70, None)))
    power_D = (x_NP[:, kept] ** 2).mean(axis=0) @ weight_PD[kept] ** 2
    return fit_line_to_outputs(one.merge(other), torch.from_numpy(power_D))


Fit = Callable[[np.ndarray, np.ndarray, list[int]], Line]


@pytest.fixture(params=[fit_to_moments, fit_to_outputs], ids=["moments", "outputs"])
def fit(request: pytest.FixtureRequest) -> Fit:
    return request.param


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kept", KEPT)
def test_the_line_is_the_polynomial_fit_of_raw_outputs(fit: Fit, seed: int, kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(seed)
    line = fit(x_NP, weight_PD, kept)
    scale_D, bias_D = naive.fit_lines(x_NP, weight_PD, kept)
    np.testing.assert_allclose(line.scale_D, scale_D, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(line.bias_D, bias_D, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", KEPT)
def test_the_relative_error_is_what_is_measured(fit: Fit, kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(1)
    line = fit(x_NP, weight_PD, kept)
    measured = naive.unexplained_fraction(x_NP, weight_PD, kept, line.scale_D.numpy(), line.bias_D.numpy())
    assert line.relative_error == pytest.approx(measured, rel=1e-5)
    assert 0 < line.relative_error < 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kept", KEPT)
def test_a_line_is_never_worse_than_no_recovery(fit: Fit, seed: int, kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(seed)
    line = fit(x_NP, weight_PD, kept)
    y_ND = x_NP @ weight_PD
    part_ND = x_NP[:, kept] @ weight_PD[kept]
    with_line_D = ((y_ND - part_ND * line.scale_D.numpy() - line.bias_D.numpy()) ** 2).mean(axis=0)
    without_D = ((y_ND - part_ND) ** 2).mean(axis=0)
    only_bias_D = (y_ND - part_ND).var(axis=0)
    assert (with_line_D <= only_bias_D * (1 + 1e-6)).all()
    assert (only_bias_D <= without_D * (1 + 1e-12)).all()


def test_with_nothing_removed_the_line_is_the_identity(fit: Fit) -> None:
    x_NP, weight_PD = random_activations(2)
    line = fit(x_NP, weight_PD, list(range(24)))
    np.testing.assert_allclose(line.scale_D, 1, rtol=1e-12)
    np.testing.assert_allclose(line.bias_D, 0, atol=1e-10)
    assert line.relative_error == pytest.approx(0, abs=1e-12)


def test_restored_weights_and_bias_give_the_line_in_the_kept_output(fit: Fit) -> None:
    x_NP, weight_PD = random_activations(3)
    kept = KEPT[2]
    line = fit(x_NP, weight_PD, kept)
    restored_SD = line.restore(torch.from_numpy(weight_PD[kept]))
    found_ND = x_NP[:, kept] @ restored_SD.numpy() + line.bias_D.numpy()
    scale_D, bias_D = naive.fit_lines(x_NP, weight_PD, kept)
    np.testing.assert_allclose(found_ND, (x_NP[:, kept] @ weight_PD[kept]) * scale_D + bias_D, rtol=1e-5, atol=1e-4)


def test_an_output_dim_that_is_always_zero_keeps_scale_1(fit: Fit) -> None:
    x_NP, weight_PD = random_activations(4)
    weight_PD[:, 3] = 0
    line = fit(x_NP, weight_PD, KEPT[2])
    assert line.scale_D[3] == 1
    assert line.bias_D[3] == 0
    assert np.isfinite(line.relative_error)


@pytest.mark.parametrize("value", [0.1, 2.0, 1e4])
def test_constant_inputs_keep_scale_1_and_their_bias_makes_up_for_all_that_is_lost(fit: Fit, value: float) -> None:
    _, weight_PD = random_activations(5)
    x_NP = np.full((50, 24), value)
    line = fit(x_NP, weight_PD, KEPT[1])
    assert (line.scale_D == 1).all()
    lost_D = (x_NP @ weight_PD)[0] - (x_NP[:, KEPT[1]] @ weight_PD[KEPT[1]])[0]
    np.testing.assert_allclose(line.bias_D, lost_D, rtol=1e-9)


def test_a_kept_part_that_is_constant_keeps_scale_1_and_loses_all_of_the_variance(fit: Fit) -> None:
    x_NP, weight_PD = random_activations(6)
    x_NP[:, :4] = 3.0
    line = fit(x_NP, weight_PD, [0, 1, 2, 3])
    assert (line.scale_D == 1).all()
    assert line.relative_error == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(line.bias_D, (x_NP[:, 4:] @ weight_PD[4:]).mean(axis=0), rtol=1e-9)


def test_a_mean_that_dwarfs_the_spread_does_not_pass_for_a_constant(fit: Fit) -> None:
    x_NP, weight_PD = random_activations(7)
    far_NP = (x_NP - x_NP.mean(axis=0)) / x_NP.std(axis=0) + 1e4
    scale_D, _ = naive.fit_lines(far_NP - 1e4, weight_PD, KEPT[2])
    np.testing.assert_allclose(fit(far_NP, weight_PD, KEPT[2]).scale_D, scale_D, rtol=1e-4, atol=1e-5)


def test_moving_a_line_to_the_cpu_changes_nothing(fit: Fit) -> None:
    line = fit(*random_activations(0), KEPT[0])
    again = line.cpu()
    assert torch.equal(again.scale_D, line.scale_D)
    assert torch.equal(again.bias_D, line.bias_D)
    assert again.relative_error == line.relative_error
