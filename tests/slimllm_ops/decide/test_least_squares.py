"""The refit of the kept inputs matches NumPy's least squares over raw activations."""

import numpy as np
import pytest
import torch

from slimllm_ops.decide.elimination import ridge
from slimllm_ops.decide.least_squares import Refit, refit
from slimllm_ops.decide.recovery import fit_line
from slimllm_ops.errors import SolveError
from slimllm_ops.methods import METHODS
from slimllm_ops.module_solves import decide_module, eliminate_module
from slimllm_ops.moments.moments import PackedMoments
from slimllm_ops.moments.observation import PackedObservation
from slimllm_ops.moments.ranking import Ranking
from tests.slimllm_ops.naive import exact_projection, observe, projection_of, random_activations, ridge_fit

KEPT = [[0], [1, 4, 20], list(range(12)), list(range(0, 24, 2)), [c for c in range(24) if c != 5]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kept", KEPT)
def test_the_refit_is_the_ridge_regression_of_raw_outputs(seed: int, kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(seed)
    fitted = refit(exact_projection(x_NP, weight_PD), torch.tensor(kept))
    expected_SD = ridge_fit(x_NP, weight_PD, kept, 0.01 * x_NP.var(axis=0).mean())
    bias_D = (x_NP @ weight_PD - x_NP[:, kept] @ expected_SD).mean(axis=0)
    np.testing.assert_allclose(fitted.weight_SD, expected_SD, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(fitted.bias_D, bias_D, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kept", KEPT)
def test_moments_as_they_are_observed_give_the_same_to_float32(kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(1)
    fitted = refit(projection_of(x_NP, weight_PD), torch.tensor(kept))
    exact = refit(exact_projection(x_NP, weight_PD), torch.tensor(kept))
    np.testing.assert_allclose(fitted.weight_SD, exact.weight_SD, atol=1e-4)


@pytest.mark.parametrize("kept", KEPT)
def test_the_relative_error_is_what_is_measured(kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(2)
    fitted = refit(exact_projection(x_NP, weight_PD), torch.tensor(kept))
    measured = training_error(x_NP, weight_PD, kept, fitted.weight_SD, fitted.bias_D)
    assert fitted.relative_error == pytest.approx(measured / (x_NP @ weight_PD).var(axis=0).sum(), rel=1e-8)
    assert 0 < fitted.relative_error < 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kept", KEPT)
def test_a_refit_is_never_worse_than_the_paper_s_line(seed: int, kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(seed)
    projection = exact_projection(x_NP, weight_PD)
    weight_SD = projection.weight_PD[kept]
    line, fitted = fit_line(projection, torch.tensor(kept)), refit(projection, torch.tensor(kept))
    lined_SD = weight_SD * line.scale_D
    by_line = training_error(x_NP, weight_PD, kept, lined_SD, line.bias_D)
    by_refit = training_error(x_NP, weight_PD, kept, fitted.weight_SD, fitted.bias_D)
    # By the ridge's objective that is so always. By the error alone too, unless next to nothing is kept: where a line
    # has nearly all the freedom that a refit has, the ridge's share of the error decides.
    penalties = [
        ridge(projection.covariance_PP) * float((new - weight_SD).square().sum())
        for new in (fitted.weight_SD, lined_SD)
    ]
    assert by_refit + penalties[0] <= (by_line + penalties[1]) * (1 + 1e-9)
    if len(kept) > 1:
        assert by_refit < by_line


def test_with_nothing_removed_the_refit_is_the_identity() -> None:
    x_NP, weight_PD = random_activations(3)
    fitted = refit(exact_projection(x_NP, weight_PD), torch.arange(24))
    np.testing.assert_allclose(fitted.weight_SD, weight_PD, rtol=1e-12)
    np.testing.assert_allclose(fitted.bias_D, 0, atol=1e-9)
    assert fitted.relative_error == pytest.approx(0, abs=1e-12)


def test_an_input_that_others_stand_for_is_lost_without_a_trace() -> None:
    x_NP, weight_PD = random_activations(4)
    x_NP[:, 7] = 0.5 * x_NP[:, 2] - x_NP[:, 9] + 3
    fitted = refit(exact_projection(x_NP, weight_PD), torch.tensor([c for c in range(24) if c != 7]))
    assert fitted.relative_error < 1e-4


def test_a_refit_restores_its_own_weight_in_the_dtype_of_the_old_one() -> None:
    fitted = Refit(torch.rand(3, 2, dtype=torch.float64), torch.rand(2, dtype=torch.float64), 0.25)
    restored = fitted.restore(torch.zeros(3, 2, dtype=torch.bfloat16))
    assert restored.dtype == torch.bfloat16
    torch.testing.assert_close(restored, fitted.weight_SD.bfloat16())
    assert fitted.cpu().weight_SD.dtype == torch.float32
    assert fitted.cpu().relative_error == 0.25


@pytest.fixture
def indefinite() -> tuple[torch.Tensor, PackedObservation]:
    """Return a weight (D, P) and moments that no data have: a variance is negative."""
    rows = [np.array([[variance] + [0.0] * (7 - c)]) for c, variance in enumerate([-0.5] + [1.0] * 7)]
    return torch.rand(4, 8), PackedObservation(PackedMoments(1, np.zeros(8), tuple(rows)), np.zeros(4))


def test_an_elimination_that_fails_names_condition_and_remedy(
    indefinite: tuple[torch.Tensor, PackedObservation],
) -> None:
    message = r"^the covariance of 8 inputs cannot be factorised \(eigenvalues from -0.49 to 1\): calibrate on"
    with pytest.raises(SolveError, match=message):
        eliminate_module(*indefinite, 8, None)


def test_a_refit_that_fails_names_condition_and_remedy(
    indefinite: tuple[torch.Tensor, PackedObservation],
) -> None:
    ranking = Ranking(tuple(range(7, -1, -1)), (0.0,) * 8)
    message = r"^the covariance of 5 inputs cannot be factorised \(eigenvalues from -0.49 to 1\): calibrate on"
    with pytest.raises(SolveError, match=message):
        decide_module(*indefinite, METHODS["gram"], ranking, [3])


def test_decisions_at_several_counts_are_those_at_each() -> None:
    x_NP, weight_PD = random_activations(5)
    weight_DP = torch.from_numpy(weight_PD).T.float()
    observed = observe(torch.from_numpy(x_NP))
    path = eliminate_module(weight_DP, observed, 6, None)
    ranking, variance = path.ranking, path.output_variance
    assert variance == pytest.approx((x_NP @ weight_PD).var(axis=0).sum(), rel=1e-5)
    together = decide_module(weight_DP, observed, METHODS["gram"], ranking, [0, 2, 5])
    assert together[0] is None
    for count, decision in zip((2, 5), together[1:], strict=True):
        (alone,) = decide_module(weight_DP, observed, METHODS["gram"], ranking, [count])
        assert decision is not None
        assert alone is not None
        assert decision.kept == alone.kept == ranking.kept_after(count)
        assert torch.equal(decision.recovery.weight_SD, alone.recovery.weight_SD)
        columns = [unit * 4 + column for unit in decision.kept for column in range(4)]
        expected = refit(projection_of(x_NP, weight_DP.T.numpy()), torch.tensor(columns))
        np.testing.assert_allclose(decision.recovery.weight_SD, expected.weight_SD, rtol=1e-6, atol=1e-6)


def training_error(
    x_NP: np.ndarray, weight_PD: np.ndarray, kept: list[int], new_SD: torch.Tensor, bias_D: torch.Tensor
) -> float:
    """Return the squared error of the recovered output per token, summed over the output dims."""
    lost_ND = x_NP @ weight_PD - x_NP[:, kept] @ new_SD.numpy() - bias_D.numpy()
    return float((lost_ND**2).sum() / len(x_NP))
