"""Heads chosen from covariances match the correlations of raw outputs."""

import numpy as np
import pytest
import torch

from slimllm_ops.decide import heads
from slimllm_ops.decide.heads import choose_heads, leave_one_out_similarity, similarity, unit_covariances
from tests.slimllm_ops import naive
from tests.slimllm_ops.naive import projection_of, random_activations

SEEDS = range(4)
# Number of units of 24 inputs: as KV groups, a unit of 12 inputs may be 2 query heads of 6, or 3 of 4.
UNITS = (2, 4, 6, 8)


@pytest.mark.parametrize("num_units", UNITS)
def test_covariances_are_those_of_the_units_outputs(num_units: int) -> None:
    x_NP, weight_PD = random_activations(0)
    found_DHH = unit_covariances(projection_of(x_NP, weight_PD), num_units)
    expected_DHH = naive.unit_covariances(x_NP, weight_PD, num_units)
    np.testing.assert_allclose(found_DHH, expected_DHH, atol=1e-6 * np.abs(expected_DHH).max())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kept", [[0], [5, 2], [1, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_similarity_is_the_summed_correlation_of_raw_outputs(seed: int, kept: list[int]) -> None:
    x_NP, weight_PD = random_activations(seed)
    found = similarity(unit_covariances(projection_of(x_NP, weight_PD), 6), kept)
    assert found == pytest.approx(naive.similarity(x_NP, weight_PD, 6, kept), rel=1e-6)


def test_keeping_everything_gives_a_similarity_of_the_number_of_output_dims() -> None:
    x_NP, weight_PD = random_activations(1, hidden=10)
    covariances_DHH = unit_covariances(projection_of(x_NP, weight_PD), 6)
    assert similarity(covariances_DHH, list(range(6))) == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("num_units", UNITS)
def test_leaving_one_out_is_the_similarity_of_the_others(num_units: int) -> None:
    covariances_DHH = unit_covariances(projection_of(*random_activations(2)), num_units)
    expected = [
        similarity(covariances_DHH, [other for other in range(num_units) if other != unit]) for unit in range(num_units)
    ]
    np.testing.assert_allclose(leave_one_out_similarity(covariances_DHH), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_units", "num_removed"), [(2, 1), (4, 1), (4, 3), (6, 3), (8, 2), (8, 5)])
def test_the_choice_is_that_of_raw_outputs(seed: int, num_units: int, num_removed: int) -> None:
    x_NP, weight_PD = random_activations(seed)
    found = choose_heads(projection_of(x_NP, weight_PD), num_units=num_units, num_removed=num_removed)
    kept, before, _ = naive.choose_heads(x_NP, weight_PD, num_units, num_removed)
    assert list(found.kept) == kept
    assert list(found.kept_before_exchange) == before


def test_the_seeds_above_include_exchanges() -> None:
    paths = [naive.choose_heads(*random_activations(seed), 8, 5)[2] for seed in SEEDS]
    assert sum(len(path) > 1 for path in paths) >= 2


@pytest.mark.parametrize("seed", range(12))
def test_an_exchange_never_lowers_the_similarity(seed: int) -> None:
    covariances_DHH = unit_covariances(projection_of(*random_activations(seed)), 8)
    choice = choose_heads(projection_of(*random_activations(seed)), num_units=8, num_removed=4)
    before = similarity(covariances_DHH, list(choice.kept_before_exchange))
    after = similarity(covariances_DHH, list(choice.kept))
    assert after > before if choice.kept != choice.kept_before_exchange else after == before


@pytest.mark.parametrize("seed", range(6))
def test_each_accepted_exchange_raises_the_similarity(seed: int) -> None:
    covariances_DHH = unit_covariances(projection_of(*random_activations(seed)), 8)
    kept, seen = [0, 1, 2], []
    for candidate in (3, 4, 5, 6, 7):
        before = similarity(covariances_DHH, kept)
        exchanged = heads.exchange(covariances_DHH, kept, [candidate])
        every = [similarity(covariances_DHH, [*kept[:slot], candidate, *kept[slot + 1 :]]) for slot in range(3)]
        if exchanged == kept:
            assert max(every) <= before * (1 + 1e-9)
        else:
            assert similarity(covariances_DHH, exchanged) == pytest.approx(max(every), rel=1e-9)
            assert max(every) > before
            seen.append(candidate)
        kept = exchanged
    assert seen, "a case in which nothing is exchanged shows nothing"


@pytest.mark.parametrize("seed", range(6))
def test_the_bar_rises_with_each_exchange(seed: int) -> None:
    covariances_DHH = unit_covariances(projection_of(*random_activations(seed)), 8)
    kept = [0, 1, 2]
    for candidate in (3, 4, 5, 6, 7):
        kept = heads.exchange(covariances_DHH, kept, [candidate])
    assert heads.exchange(covariances_DHH, [0, 1, 2], [3, 4, 5, 6, 7]) == kept


def test_a_unit_that_an_exchange_drops_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    covariances_DHH = unit_covariances(projection_of(*random_activations(0)), 8)
    tried = []
    trials = heads._exchange_similarities

    def noted(covariances: torch.Tensor, kept: list[int], candidate: int) -> torch.Tensor:
        tried.append(candidate)
        return trials(covariances, kept, candidate)

    monkeypatch.setattr(heads, "_exchange_similarities", noted)
    kept = heads.exchange(covariances_DHH, [0, 1, 2], [7, 3, 6, 4, 5])
    assert sorted(kept) != [0, 1, 2]
    assert tried == [7, 3, 6, 4, 5]


def test_removing_nothing_keeps_everything() -> None:
    choice = choose_heads(projection_of(*random_activations(0)), num_units=6, num_removed=0)
    assert choice.kept == choice.kept_before_exchange == (0, 1, 2, 3, 4, 5)


def test_a_unit_that_adds_nothing_goes_first() -> None:
    x_NP, weight_PD = random_activations(3)
    weight_PD[naive.unit_columns(2, 4)] = 0
    choice = choose_heads(projection_of(x_NP, weight_PD), num_units=6, num_removed=1)
    assert choice.kept == (0, 1, 3, 4, 5)
    assert float(choice.scores_H[2]) == pytest.approx(10, rel=1e-12)


def test_an_output_dim_that_is_always_zero_counts_as_kept() -> None:
    x_NP, weight_PD = random_activations(4)
    without = choose_heads(projection_of(x_NP, weight_PD), num_units=6, num_removed=2)
    dead_PD = np.concatenate([weight_PD, np.zeros((24, 1))], axis=1)
    choice = choose_heads(projection_of(x_NP, dead_PD), num_units=6, num_removed=2)
    assert choice.kept == without.kept
    np.testing.assert_allclose(choice.scores_H, without.scores_H + 1, rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_inputs_give_scores_that_are_numbers_and_within_bounds(value: float) -> None:
    _, weight_PD = random_activations(5)
    x_NP = np.full((50, 24), value)
    choice = choose_heads(projection_of(x_NP, weight_PD), num_units=6, num_removed=2)
    assert len(choice.kept) == 4
    assert torch.isfinite(choice.scores_H).all()
    assert (choice.scores_H <= 10 * (1 + 1e-9)).all()


def test_units_of_constant_output_beside_others_give_scores_within_bounds() -> None:
    x_NP, weight_PD = random_activations(6)
    x_NP[:, 4:] = x_NP[0, 4:]
    choice = choose_heads(projection_of(x_NP, weight_PD), num_units=6, num_removed=3)
    assert 0 in choice.kept
    np.testing.assert_allclose(choice.scores_H[1:], 10, rtol=1e-6)
    assert float(choice.scores_H[0]) <= 10


def test_units_that_cancel_give_scores_within_bounds() -> None:
    x_NP, weight_PD = random_activations(7)
    x_NP[:, 4:8], weight_PD[4:8] = x_NP[:, :4], -weight_PD[:4]
    x_NP[:, 8:] = 0
    scores_H = choose_heads(projection_of(x_NP, weight_PD), num_units=6, num_removed=2).scores_H
    assert torch.isfinite(scores_H).all()
    assert (scores_H <= 10 * (1 + 1e-6)).all()
