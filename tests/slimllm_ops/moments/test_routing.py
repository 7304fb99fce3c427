"""Each expert's observation covers exactly the tokens that were sent to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import MiscountError
from slimllm_ops.models.families import FAMILIES, Family, family_of, layer_shape
from slimllm_ops.moments.routing import PackedExperts, Routed, RoutedSum, project
from slimllm_ops.stream.passes import LayerStream
from tests.slimllm_ops import naive
from tests.tiny import save_tiny

CPU = torch.device("cpu")
LAYER = 1
MIXTURES = [family for family in FAMILIES if family.mlp.reading.experts is not None]


@pytest.fixture(params=MIXTURES, ids=lambda family: family.name)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(request.param, tmp_path / "dense")


def observe(directory: Path, batches: list[torch.Tensor]) -> tuple[PackedExperts, LayerStream]:
    """Return what a stream sees of a layer's experts."""
    stream = LayerStream(Checkpoint.open(directory), batches, CPU)
    for layer in range(LAYER):
        stream.forward(layer)
    family = stream.checkpoint.family
    stream.observe(LAYER, family.attention)
    stream.apply(LAYER, family.attention, None)
    observed = stream.observe(LAYER, family.mlp)
    assert isinstance(observed, PackedExperts)
    return observed, stream


def test_each_expert_sees_the_tokens_that_were_sent_to_it(mixture: Path, ids: torch.Tensor) -> None:
    observed, _ = observe(mixture, list(ids.split(7)))
    activations = naive.expert_activations(mixture, ids, LAYER)
    assert len(observed.experts) == len(activations)
    assert observed.count == ids.numel()
    for expert, (x_NI, input_ND) in enumerate(activations):
        seen = observed.experts[expert]
        assert seen is not None
        moments = seen.moments.unpack()
        assert moments.count == len(x_NI) > 20
        assert observed.share(expert) == len(x_NI) / ids.numel()
        second_II = x_NI.T @ x_NI / len(x_NI)
        found = moments.about_zero().covariance_PP
        np.testing.assert_allclose(found, second_II, rtol=1e-4, atol=1e-6 * np.abs(second_II).max())
        np.testing.assert_allclose(seen.input_squares_D, (input_ND**2).sum(axis=0), rtol=1e-5)
    chosen = Checkpoint.open(mixture).config.num_experts_per_tok
    assert sum(map(observed.share, range(len(activations)))) == pytest.approx(chosen)


def test_observations_of_shards_merge_to_that_of_all_tokens(mixture: Path, ids: torch.Tensor) -> None:
    one, other = (observe(mixture, [part])[0] for part in (ids[:20], ids[20:]))
    merged, together = one.merge(other), observe(mixture, [ids])[0]
    assert merged.count == together.count
    assert merged.num_bytes == together.num_bytes
    for found, expected in zip(naive.observations(merged), naive.observations(together), strict=True):
        assert found.moments.count == expected.moments.count
        covariances = (seen.moments.unpack().about_zero().covariance_PP for seen in (found, expected))
        torch.testing.assert_close(*covariances, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.input_squares_D, expected.input_squares_D, rtol=1e-5)


def routed(experts: list[list[int]], channels: int = 6) -> Routed:
    """Return random activations of tokens that are sent to these experts, as one batch of one block."""
    experts_Nk = torch.tensor(experts)
    generator = torch.Generator().manual_seed(0)
    return Routed(torch.randn(1, *experts_Nk.shape, channels, generator=generator), experts_Nk[None])


def summed(batch: Routed, num_experts: int) -> PackedExperts:
    seen = RoutedSum(num_experts)
    seen.add(batch, torch.ones(*batch.x_bTkI.shape[:2], 4))
    return seen.packed()


def test_an_expert_without_tokens_has_nothing_until_a_shard_brings_some() -> None:
    one, other = summed(routed([[0, 2], [2, 0], [0, 2]]), 4), summed(routed([[1, 2], [2, 1]]), 4)
    assert (one.idle, other.idle) == ((1, 3), (0, 3))
    merged = one.merge(other)
    assert merged.idle == (3,)
    assert [merged.share(expert) for expert in range(4)] == [3 / 5, 2 / 5, 1.0, 0.0]
    assert merged.is_finite()


def test_moments_that_are_not_of_all_tokens_are_an_error() -> None:
    observed = summed(routed([[0, 2], [2, 0], [0, 2]]), 4)
    observed.require_tokens(3)
    with pytest.raises(MiscountError, match=r"^the moments cover 3 tokens, but 6 were sent"):
        observed.require_tokens(6)


def test_what_is_no_number_is_seen() -> None:
    batch = routed([[0, 2], [2, 0], [0, 2]])
    batch.x_bTkI[0, 1, 0, 3] = torch.inf
    assert not summed(batch, 4).is_finite()


def test_what_experts_add_is_the_sum_over_a_tokens_places() -> None:
    batch, weight_EDI = routed([[0, 2], [2, 0], [1, 2]]), torch.randn(4, 5, 6)
    kept_ES = torch.tensor([[0, 1], [2, 5], [1, 3], [0, 4]])
    expected = torch.stack(
        [
            sum(weight_EDI[expert] @ x_I for expert, x_I in zip(experts, x_kI, strict=True))
            for experts, x_kI in zip(batch.experts_bTk[0].tolist(), batch.x_bTkI[0], strict=True)
        ]
    )
    torch.testing.assert_close(project(batch, weight_EDI, None)[0], expected)
    masked_EDI = torch.zeros_like(weight_EDI)
    for expert, kept_S in enumerate(kept_ES):
        masked_EDI[expert][:, kept_S] = weight_EDI[expert][:, kept_S]
    kept_EDS = torch.stack([weight_DI[:, kept_S] for weight_DI, kept_S in zip(weight_EDI, kept_ES, strict=True)])
    torch.testing.assert_close(project(batch, kept_EDS, kept_ES), project(batch, masked_EDI, None))


@pytest.mark.parametrize("family", MIXTURES, ids=lambda family: family.name)
def test_a_layer_has_as_many_experts_as_its_config_says(family: Family, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path / "dense")).config
    assert family_of(config) is family
    shape = layer_shape(config, 0)
    assert shape.num_experts == {"mixtral": 4, "qwen3_moe": 5, "olmoe": 4}[family.model_type]
    assert shape.num_channels == shape.num_experts * 48
