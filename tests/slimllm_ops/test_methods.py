"""Every method's ranking and recovery match plain formulas over raw activations; users can add methods."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from slimllm_ops.allocate.budget import spend_evenly
from slimllm_ops.decide.elimination import eliminate
from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.recovery import Line
from slimllm_ops.methods import METHODS, Method, compensate_mean, leave
from slimllm_ops.module_solves import decide_module, rank_module
from slimllm_ops.moments.projection import Fisher, Projection
from slimllm_ops.moments.ranking import Ranking
from tests.slimllm_ops.naive import exact_projection, observe, random_activations, unit_columns

KEPT = [[0], [1, 4, 20], list(range(12)), list(range(24))]


def fluctuation(x_NP: np.ndarray, weight_PD: np.ndarray) -> list[float]:
    """FLAP: the variance of an input times the squared norm of its weights."""
    return [x_NP[:, c].var() * sum(w**2 for w in weight_PD[c]) for c in range(x_NP.shape[1])]


def wanda(x_NP: np.ndarray, weight_PD: np.ndarray) -> list[float]:
    """Wanda, FASP: |W_cj| |X_c|, summed over the outputs."""
    return [sum(abs(w) * np.linalg.norm(x_NP[:, c]) for w in weight_PD[c]) for c in range(x_NP.shape[1])]


def magnitude(x_NP: np.ndarray, weight_PD: np.ndarray) -> list[float]:
    """The norm of an input's weights."""
    return [np.linalg.norm(weight_PD[c]) for c in range(x_NP.shape[1])]


def leverage(x_NP: np.ndarray, weight_PD: np.ndarray) -> list[float]:
    """MoDeGPT: the ridge leverage of an input, from the eigenvectors of E x x^T."""
    values, vectors = np.linalg.eigh(x_NP.T @ x_NP / len(x_NP))
    return list((vectors**2) @ (values / (values + 0.01 * values.mean())))


METRICS = {"flap": fluctuation, "fasp": wanda, "wanda-sp": wanda, "magnitude": magnitude, "modegpt": leverage}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("num_units", [24, 6])
@pytest.mark.parametrize("seed", range(3))
def test_units_go_by_the_mean_of_their_inputs_metric(name: str, num_units: int, seed: int) -> None:
    x_NP, weight_PD = random_activations(seed)
    ranking = METHODS[name].rank(exact_projection(x_NP, weight_PD), num_units)
    by_input = np.array(METRICS[name](x_NP, weight_PD))
    by_unit = [by_input[unit_columns(unit, 24 // num_units)].mean() for unit in range(num_units)]
    assert list(ranking.order) == sorted(range(num_units), key=by_unit.__getitem__)
    np.testing.assert_allclose(ranking.scores(), by_unit, rtol=1e-9)


@pytest.mark.parametrize("num_units", [24, 6])
def test_the_brain_surgeons_eliminate_and_only_gram_weighs_errors_by_the_loss(num_units: int) -> None:
    plain = exact_projection(*random_activations(0))
    size = plain.weight_PD.shape[1]
    weighed = replace(plain, fisher=Fisher(torch.diag(torch.arange(size).double() ** 4)))
    assert METHODS["gram"].rank(weighed, num_units) == eliminate(weighed, num_units) != eliminate(plain, num_units)
    for name in ("ziplm", "slimgpt"):
        assert METHODS[name].rank(weighed, num_units) == eliminate(plain, num_units)


def test_random_is_the_same_for_the_same_weights_and_another_for_others() -> None:
    rank = METHODS["random"].rank
    one, other = (exact_projection(*random_activations(seed)) for seed in (0, 1))
    assert rank(one, 24) == rank(exact_projection(*random_activations(0)), 24)
    assert rank(one, 24).order != rank(other, 24).order
    assert rank(one, 24).order != tuple(range(24))


@pytest.mark.parametrize("kept", KEPT)
def test_compensation_makes_up_for_the_mean_of_what_is_gone(kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(2)
    line = compensate_mean(exact_projection(x_NP, weight_PD), torch.tensor(kept))
    gone = [c for c in range(24) if c not in kept]
    lost_ND = x_NP[:, gone] @ weight_PD[gone]
    np.testing.assert_allclose(line.bias_D, lost_ND.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(line.scale_D, 1)
    expected = lost_ND.var(axis=0).sum() / (x_NP @ weight_PD).var(axis=0).sum()
    assert line.relative_error == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kept", KEPT)
def test_leaving_changes_nothing_of_what_stays(kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(3)
    line = leave(exact_projection(x_NP, weight_PD), torch.tensor(kept))
    assert not line.bias_D.any()
    restored_SD = line.restore(torch.from_numpy(weight_PD[kept]))
    np.testing.assert_array_equal(restored_SD, weight_PD[kept])


@pytest.mark.parametrize("name", METHODS)
def test_every_row_ranks_all_units_recovers_and_says_whose_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.source
    assert method.differs or name == "gram"
    projection = exact_projection(*random_activations(4))
    ranking = method.rank(projection, 6)
    assert sorted(ranking.order) == list(range(6))
    assert list(ranking.costs) == sorted(ranking.costs) or method.rank is eliminate
    recovery = method.recover(projection, torch.arange(20))
    assert isinstance(recovery, Line | Refit)
    assert recovery.restore(torch.ones(20, 10)).shape == (20, 10)


def test_a_user_s_method_is_three_functions_and_a_row() -> None:
    def rank_backwards(projection: Projection, num_units: int) -> Ranking:
        return Ranking(tuple(reversed(range(num_units))), (1.0,) * num_units)

    def halve(projection: Projection, kept_S: torch.Tensor) -> Line:
        half_D = torch.full_like(projection.variance_D, 0.5)
        return Line(half_D, torch.zeros_like(half_D), 0.25)

    mine = Method("mine", rank_backwards, spend_evenly, halve, "a test", "all")
    x_NP, weight_PD = random_activations(5)
    weight_DP = torch.from_numpy(weight_PD).T.float()
    observed = observe(torch.from_numpy(x_NP))
    ranking = rank_module(weight_DP, observed, 6, None, mine)
    assert ranking.order == (5, 4, 3, 2, 1, 0)
    none, decision = decide_module(weight_DP, observed, mine, ranking, [0, 2])
    assert none is None
    assert decision is not None
    assert decision.kept == (0, 1, 2, 3)
    assert decision.relative_error == 0.25
    assert torch.equal(decision.recovery.scale_D, torch.full((10,), 0.5, dtype=torch.float64))
