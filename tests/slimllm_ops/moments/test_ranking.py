"""The order in which units are removed."""

import torch

from slimllm_ops.moments.ranking import Ranking


def test_the_lowest_score_goes_first_and_of_equals_the_one_with_the_lower_number() -> None:
    ranking = Ranking.by_score(torch.tensor([3.0, 1.0, 2.0, 1.0]))
    assert ranking.order == (1, 3, 2, 0)
    assert ranking.costs == (1.0, 1.0, 2.0, 3.0)


def test_what_is_kept_is_nested_and_ascending() -> None:
    ranking = Ranking.by_score(torch.rand(30, generator=torch.Generator().manual_seed(0)))
    kept = [ranking.kept_after(count) for count in range(30)]
    assert kept[0] == tuple(range(30))
    for count in range(1, 30):
        assert list(kept[count]) == sorted(kept[count])
        assert set(kept[count]) == set(kept[count - 1]) - {ranking.order[count - 1]}


def test_scores_are_by_unit() -> None:
    scores = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert Ranking.by_score(scores).scores() == tuple(scores.tolist())


def test_parts_that_take_turns_lose_one_unit_each_in_their_own_order() -> None:
    one, other = Ranking((2, 0, 1), (1.0, 2.0, 3.0)), Ranking((1, 2, 0), (4.0, 5.0, 6.0))
    joined = Ranking.in_turn([one, other])
    assert joined.order == (2, 3 + 1, 0, 3 + 2, 1, 3 + 0)
    assert joined.costs == (1.0, 4.0, 2.0, 5.0, 3.0, 6.0)
    assert Ranking.in_turn([one]) == one
