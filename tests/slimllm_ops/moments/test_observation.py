"""Observations of plain branches and of experts follow one protocol."""

import pytest
import torch

from slimllm_ops.errors import MiscountError, SolveError
from slimllm_ops.moments.observation import PackedObservation
from slimllm_ops.moments.routing import PackedExperts, observed_from_arrays
from tests.slimllm_ops.naive import observations, observe

CPU = torch.device("cpu")


def plain(seed: int, num_tokens: int = 50) -> PackedObservation:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64) + 3
    return observe(rows, torch.rand(num_tokens, 4, generator=generator))


def experts(seed: int) -> PackedExperts:
    """Three experts over 80 tokens, the second without any."""
    return PackedExperts(80, (plain(seed), None, plain(seed + 10, 20)))


@pytest.mark.parametrize("observed", [plain(0), experts(0)])
def test_an_observation_is_read_from_the_arrays_that_it_was_written_as(
    observed: PackedObservation | PackedExperts,
) -> None:
    found = observed_from_arrays(observed.to_arrays() | {"order": torch.arange(3).numpy()})
    assert type(found) is type(observed)
    assert (found.idle, found.num_bytes) == (observed.idle, observed.num_bytes)
    for one, other in zip(*map(observations, (found, observed)), strict=True):
        unpacked, expected = one.unpack(CPU), other.unpack(CPU)
        assert torch.equal(unpacked.moments.covariance_PP, expected.moments.covariance_PP)
        assert torch.equal(unpacked.input_squares_D, expected.input_squares_D)
        assert one.moments.count == other.moments.count


@pytest.mark.parametrize("observed", [plain(0), experts(0)])
def test_without_an_intercept_the_moments_of_every_part_are_about_zero(
    observed: PackedObservation | PackedExperts,
) -> None:
    weight = torch.ones(4, 6) if isinstance(observed, PackedObservation) else torch.ones(3, 4, 6)
    parts = list(observed.with_intercept(False).parts(weight))
    seen = [part.observation for part in parts if part.observation is not None]
    for found, expected in zip(seen, observations(observed), strict=True):
        about_zero = expected.moments.unpack().about_zero()
        assert not found.moments.mean_P.any()
        assert torch.equal(found.moments.covariance_PP, about_zero.covariance_PP)


def test_a_plain_branch_is_one_part_that_every_token_passes() -> None:
    observed, weight_DP = plain(0), torch.ones(4, 6)
    (part,) = observed.parts(weight_DP)
    assert (part.share, part.name, observed.idle) == (1.0, "", ())
    assert part.weight_DP is weight_DP
    assert part.observation is not None
    assert torch.equal(part.observation.moments.mean_P, observed.moments.unpack().mean_P)
    assert observed.split(weight_DP) == (weight_DP,)
    assert observed.joined(["fit"], lambda fits: "joined") == "fit"


def test_every_expert_is_a_part_and_one_without_tokens_has_no_projection() -> None:
    observed, weight_EDI = experts(0), torch.rand(3, 4, 6)
    parts = list(observed.parts(weight_EDI))
    assert [part.name for part in parts] == ["expert 0", "expert 1", "expert 2"]
    assert [part.share for part in parts] == [50 / 80, 0.0, 20 / 80]
    assert [part.projection is None for part in parts] == [False, True, False]
    assert parts[1].output_variance == 0
    assert all(torch.equal(part.weight_DP, weight_DI) for part, weight_DI in zip(parts, weight_EDI, strict=True))
    assert observed.joined(["a", "b", "c"], "".join) == "abc"


def test_experts_never_have_an_intercept() -> None:
    assert not experts(0).with_intercept(True).intercept
    assert not experts(0).merge(experts(1)).intercept


def test_a_merged_observation_keeps_its_choice_of_intercept() -> None:
    one, other = plain(0), plain(1)
    assert one.merge(other).intercept
    merged = one.with_intercept(False).merge(other.with_intercept(False))
    assert not merged.intercept


def test_moments_that_are_not_of_all_tokens_are_an_error() -> None:
    plain(0).require_tokens(50)
    with pytest.raises(MiscountError, match=r"^the moments cover 50 tokens, but 64 were sent: .* worth reporting$"):
        plain(0).require_tokens(64)


def test_an_error_of_a_solve_names_the_expert_and_says_no_more_of_a_plain_branch() -> None:
    parts = (*plain(0).parts(torch.ones(4, 6)), list(experts(0).parts(torch.ones(3, 4, 6)))[2])
    for part, said in zip(parts, ("singular", "expert 2: singular"), strict=True):
        with pytest.raises(SolveError) as raised, part.named_in_errors():
            raise SolveError("singular")
        assert str(raised.value) == said
