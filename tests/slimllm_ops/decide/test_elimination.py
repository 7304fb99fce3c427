"""Backward elimination matches trials of every unit, one by one, with least squares over raw activations.

When the inputs R are removed and the rest refitted, the ridge's objective

    L(R) = min over V with V_R = 0 of  |X_c (W - V)|^2 / N  +  d |W - V|^2,      X_c the centred inputs,

is L(R) = tr( W_R^T (A_RR)^-1 W_R ), A = (C + d I)^-1. A removal's cost is the increase of L, so costs add up to L.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from slimllm_ops.decide import elimination
from slimllm_ops.decide.elimination import eliminate, factorise, invert, ridge
from slimllm_ops.decide.least_squares import refit
from slimllm_ops.errors import SolveError
from slimllm_ops.moments.projection import Fisher
from tests.slimllm_ops.naive import exact_projection, random_activations, ridge_residual, unit_columns

VIEWS = {"slice", "select", "view", "unsqueeze", "as_strided", "expand", "transpose", "t", "unflatten", "detach"}


def eliminate_naively(x_NP: np.ndarray, weight_PD: np.ndarray, num_units: int) -> tuple[list[int], list[float]]:
    """Return order and costs: in each round, try every unit that is left."""
    width = len(weight_PD) // num_units
    inputs = {unit: list(range(*unit_columns(unit, width).indices(len(weight_PD)))) for unit in range(num_units)}
    d = 0.01 * x_NP.var(axis=0).mean()
    left, order, losses = list(range(num_units)), [], [0.0]
    while left:
        trials = {}
        for unit in left:
            kept = [column for other in left if other != unit for column in inputs[other]]
            trials[unit] = ridge_residual(x_NP, weight_PD, kept, d)
        cheapest = min(left, key=trials.__getitem__)
        left.remove(cheapest)
        order.append(cheapest)
        losses.append(trials[cheapest])
    return order, list(np.diff(losses))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [1, 5, 24, 128])
def test_single_inputs_go_in_the_order_of_trials_one_by_one(
    seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "BLOCK", block)
    x_NP, weight_PD = random_activations(seed)
    ranking = eliminate(exact_projection(x_NP, weight_PD), 24)
    order, costs = eliminate_naively(x_NP, weight_PD, 24)
    assert list(ranking.order) == order
    np.testing.assert_allclose(ranking.costs, costs, rtol=1e-9)


def operations(both_2PP: torch.Tensor, size: int) -> int:
    """Return how many operations a block of eliminations dispatches; views of tensors are none."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        elimination._eliminate_block(both_2PP, size)
    names = [event.name for event in profiled.events() if event.cpu_parent is None]
    return sum(name.startswith("aten::") and name.removeprefix("aten::") not in VIEWS for name in names)


def test_an_elimination_takes_eight_operations() -> None:
    projection = exact_projection(*random_activations(0, width=96))
    both_2PP = torch.stack((projection.weight_PD @ projection.weight_PD.T, invert(projection)))
    few, many = (operations(both_2PP, size) for size in (20, 60))
    assert many - few == 8 * (60 - 20)


def test_rounding_makes_no_cost_negative() -> None:
    x_NP, weight_PD = random_activations(1)
    # Each is a multiple of the input before it, and has the opposite share in the output, so both together give none.
    x_NP[:, 1::2], weight_PD[1::2] = 2 * x_NP[:, ::2], -0.5 * weight_PD[::2]
    ranking = eliminate(exact_projection(x_NP, weight_PD), 24)
    assert min(ranking.costs) >= -1e-12
    everything = ridge_residual(x_NP, weight_PD, [], 0.01 * x_NP.var(axis=0).mean())
    assert sum(ranking.costs) == pytest.approx(everything, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_units", [2, 4, 8, 12])
def test_groups_go_in_the_order_of_trials_one_by_one(seed: int, num_units: int) -> None:
    x_NP, weight_PD = random_activations(seed)
    ranking = eliminate(exact_projection(x_NP, weight_PD), num_units)
    order, costs = eliminate_naively(x_NP, weight_PD, num_units)
    assert list(ranking.order) == order
    np.testing.assert_allclose(ranking.costs, costs, rtol=1e-9)


def test_the_path_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    projection = exact_projection(*random_activations(0, tokens=900, width=300, hidden=40))
    whole = eliminate(projection, 300)
    monkeypatch.setattr(elimination, "BLOCK", 1)
    one_by_one = eliminate(projection, 300)
    assert whole.order == one_by_one.order
    np.testing.assert_allclose(whole.costs, one_by_one.costs, rtol=1e-9)


@pytest.mark.parametrize("num_units", [6, 24])
@pytest.mark.parametrize("removed", [1, 3, 5])
def test_costs_add_up_to_what_the_refit_leaves(num_units: int, removed: int) -> None:
    x_NP, weight_PD = random_activations(4)
    projection = exact_projection(x_NP, weight_PD)
    ranking = eliminate(projection, num_units)
    columns = projection_inputs(ranking.kept_after(removed), 24 // num_units)
    fitted_PD = np.zeros_like(weight_PD)
    fitted_PD[columns] = refit(projection, torch.tensor(columns)).weight_SD.numpy()
    lost_ND = (x_NP - x_NP.mean(axis=0)) @ (weight_PD - fitted_PD)
    penalty = ridge(projection.covariance_PP) * ((weight_PD - fitted_PD) ** 2).sum()
    measured = (lost_ND**2).sum() / len(x_NP) + penalty
    assert sum(ranking.costs[:removed]) == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("num_units", [6, 24])
def test_all_costs_together_are_the_whole_output(num_units: int) -> None:
    x_NP, weight_PD = random_activations(5)
    projection = exact_projection(x_NP, weight_PD)
    whole = (x_NP @ weight_PD).var(axis=0).sum() + ridge(projection.covariance_PP) * (weight_PD**2).sum()
    assert sum(eliminate(projection, num_units).costs) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("num_units", [6, 24])
def test_with_the_fisher_information_costs_are_what_the_errors_add_to_the_loss(num_units: int) -> None:
    x_NP, weight_PD = random_activations(11)
    hidden = weight_PD.shape[1]
    gradient_ND = np.random.default_rng(0).normal(size=(40, hidden)) * np.geomspace(1, 100, hidden)
    fisher_DD = gradient_ND.T @ gradient_ND / 40
    projection = replace(exact_projection(x_NP, weight_PD), fisher=Fisher(torch.from_numpy(fisher_DD)))
    ranking = eliminate(projection, num_units)
    # Half of it is spread over all dims. With any root of it, the loss of an error is a sum of squares.
    shrunk_DD = (fisher_DD + np.trace(fisher_DD) / hidden * np.eye(hidden)) / 2
    order, costs = eliminate_naively(x_NP, weight_PD @ np.linalg.cholesky(shrunk_DD / 2), num_units)
    assert list(ranking.order) == order
    np.testing.assert_allclose(ranking.costs, costs, rtol=1e-9)
    assert list(ranking.order) != list(eliminate(exact_projection(x_NP, weight_PD), num_units).order)


def test_every_cost_is_positive_and_no_unit_goes_twice() -> None:
    ranking = eliminate(exact_projection(*random_activations(6, width=200, hidden=16)), 200)
    assert sorted(ranking.order) == list(range(200))
    assert min(ranking.costs) > 0


def test_a_copy_of_another_input_goes_before_all_that_carry_something() -> None:
    x_NP, weight_PD = random_activations(7)
    x_NP[:, 20] = x_NP[:, 3]
    assert eliminate(exact_projection(x_NP, weight_PD), 24).order[0] in (3, 20)


def test_a_dead_input_costs_next_to_nothing() -> None:
    x_NP, weight_PD = random_activations(8)
    x_NP[:, 11] = 4.0
    projection = exact_projection(x_NP, weight_PD)
    ranking = eliminate(projection, 24)
    assert ranking.order[0] == 11
    # What it costs is the ridge's share of its weights.
    assert ranking.costs[0] == pytest.approx(ridge(projection.covariance_PP) * (weight_PD[11] ** 2).sum(), rel=1e-9)


def test_the_inverse_is_that_of_the_regularised_covariance() -> None:
    x_NP, weight_PD = random_activations(9)
    covariance = np.cov(x_NP, rowvar=False, bias=True)
    regular = covariance + 0.01 * covariance.diagonal().mean() * np.eye(24)
    np.testing.assert_allclose(invert(exact_projection(x_NP, weight_PD)).numpy() @ regular, np.eye(24), atol=1e-9)


@pytest.mark.parametrize("spread", [0.0, 1e-40])
@pytest.mark.parametrize("num_units", [6, 24])
def test_constant_inputs_cost_nothing(spread: float, num_units: int) -> None:
    """A bias recovers them. Of inputs so small that their squares are no numbers, nothing more is known."""
    x_NP, weight_PD = random_activations(10)
    projection = exact_projection(3.0 + 0 * x_NP if not spread else spread * x_NP, weight_PD)
    ranking = eliminate(projection, num_units)
    assert sorted(ranking.order) == list(range(num_units))
    assert set(ranking.costs) == {0.0}
    fitted = refit(projection, torch.arange(24 // num_units))
    assert fitted.relative_error == 0 or spread
    torch.testing.assert_close(fitted.weight_SD, projection.weight_PD[: 24 // num_units])


def test_what_cannot_be_factorised_is_an_error_with_its_eigenvalues() -> None:
    matrix = torch.diag(torch.tensor([2.0, 1.0, -0.25]))
    with pytest.raises(
        SolveError, match=r"3 inputs cannot be factorised \(eigenvalues from -0.25 to 2\): calibrate on"
    ):
        factorise(matrix)
    with pytest.raises(SolveError, match="3 inputs holds NaN or infinity: the activations overflow"):
        factorise(matrix * float("nan"))


def projection_inputs(units: tuple[int, ...], width: int) -> list[int]:
    """Return the inputs of units, side by side."""
    return [unit * width + column for unit in units for column in range(width)]


WIDE_GROUPS = """
import torch
from slimllm_ops.decide.elimination import eliminate
from slimllm_ops.moments.moments import Moments
from slimllm_ops.moments.projection import Projection

torch.set_num_threads(2)
torch.manual_seed(0)
projection = Projection.of(Moments.of(torch.randn(2048, 1024)), torch.randn(512, 1024))
assert sorted(eliminate(projection, 4).order) == [0, 1, 2, 3]
"""


def test_wide_groups_are_eliminated_by_several_threads() -> None:
    """LU solves of a batch of 256 x 256 matrices by two threads never ended in a build of MKL."""
    subprocess.run([sys.executable, "-c", WIDE_GROUPS], check=True, timeout=60)
