"""An MLP pruned by its outputs passes the states that its pruned weights pass, and sums what raw outputs sum to."""

from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.moments.outputs import OutputObservation, OutputPairs
from slimllm_ops.stream.outputs import LayerwiseStream, output_of
from slimllm_ops.stream.padding import PADDING
from tests.slimllm_ops.pruned import prune_mlp
from tests.slimllm_ops.stream.whole import NUM_LAYERS

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(model_dir: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(model_dir)
    if checkpoint.family.mlp.has_experts:
        pytest.skip("experts are decided by their moments")
    return checkpoint


@pytest.mark.parametrize("intercept", [True, False])
def test_the_states_are_those_of_the_pruned_weights(
    checkpoint: Checkpoint, batches: list[torch.Tensor], intercept: bool
) -> None:
    stream, written = (LayerwiseStream(checkpoint, batches, CPU, intercept=intercept) for _ in range(2))
    attention, mlp = checkpoint.family.branches
    for layer in range(NUM_LAYERS):
        stream.forward_branch(layer, attention)
        written.forward_branch(layer, attention)
        decision = prune_mlp(stream, layer)
        written.forward_branch(layer, mlp, decision)
        assert decision.with_bias == intercept
        for one, other in zip(stream.hidden, written.hidden, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_replayed_layer_passes_the_same_bits(checkpoint: Checkpoint, batches: list[torch.Tensor]) -> None:
    stream, replaying = (LayerwiseStream(checkpoint, batches, CPU) for _ in range(2))
    for layer in range(NUM_LAYERS):
        stream.forward_branch(layer, checkpoint.family.attention)
        replaying.forward_pruned(layer, LayerPlan(mlp=prune_mlp(stream, layer)))
    assert all(torch.equal(one, other) for one, other in zip(stream.hidden, replaying.hidden, strict=True))


@pytest.mark.parametrize("num_kept", [1, 7, 12, 13, 20, 24])
def test_the_kept_output_is_that_of_the_kept_channels(num_kept: int) -> None:
    torch.manual_seed(num_kept)
    x_bTP, weight_DP = torch.randn(2, 5, 24), torch.randn(6, 24)
    kept = sorted(torch.randperm(24)[:num_kept].tolist())
    found = output_of(kept, weight_DP)(x_bTP, x_bTP @ weight_DP.T)
    torch.testing.assert_close(found, x_bTP[..., kept] @ weight_DP[:, kept].T, rtol=1e-4, atol=1e-5)


def sums_of(checkpoint: Checkpoint, batches: list[torch.Tensor]) -> tuple[OutputObservation, OutputPairs]:
    """Observe the first MLP, and compare the output of some channels with the full one."""
    stream = LayerwiseStream(checkpoint, batches, CPU)
    stream.forward_branch(0, checkpoint.family.attention)
    return stream.observe_output(0), stream.compare_outputs(0, range(3, 31))


def assert_same(found: tuple[OutputObservation, OutputPairs], right: tuple[OutputObservation, OutputPairs]) -> None:
    (seen, pairs), (seen_right, pairs_right) = found, right
    assert (seen.outputs.count, pairs.count) == (seen_right.outputs.count, pairs_right.count)
    np.testing.assert_allclose(pairs.sums_5D, pairs_right.sums_5D, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(seen.x_squares_P, seen_right.x_squares_P, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen.input_squares_D, seen_right.input_squares_D, rtol=1e-4, atol=1e-6)
    covariance, expected = (one.outputs.unpack().covariance_PP for one in (seen, seen_right))
    torch.testing.assert_close(covariance, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def merged(parts: list[tuple[OutputObservation, OutputPairs]]) -> tuple[OutputObservation, OutputPairs]:
    return reduce(OutputObservation.merge, [one for one, _ in parts]), reduce(
        OutputPairs.merge, [one for _, one in parts]
    )


def test_the_sums_of_shards_merge_to_those_of_all_tokens(checkpoint: Checkpoint, batches: list[torch.Tensor]) -> None:
    shards = merged([sums_of(checkpoint, [batch]) for batch in batches])
    assert_same(shards, sums_of(checkpoint, batches))
    for sums in shards:
        sums.require_tokens(sum(batch.numel() for batch in batches))


def test_padding_is_in_no_sum(checkpoint: Checkpoint, ids: torch.Tensor) -> None:
    rows = ids[:2, :12].clone()
    rows[0, 7:] = PADDING
    alone = merged([sums_of(checkpoint, [row]) for row in (rows[:1, :7], rows[1:])])
    assert_same(sums_of(checkpoint, [rows]), alone)


def test_the_moments_of_the_output_are_those_of_raw_outputs(
    checkpoint: Checkpoint, batches: list[torch.Tensor]
) -> None:
    stream, mlp = LayerwiseStream(checkpoint, batches, CPU), checkpoint.family.mlp
    stream.forward_branch(0, checkpoint.family.attention)
    run = stream.branch(0, mlp)
    x_NP = torch.cat([run.run(run.normalise(states)).flatten(0, 1) for states in stream.entering(0, mlp)]).double()
    y_ND = x_NP @ stream.weights(0)[mlp.output_weight].T.double()
    observed = stream.observe_output(0)
    expected = torch.cov(y_ND.T, correction=0)
    found = observed.outputs.unpack().covariance_PP
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    np.testing.assert_allclose(observed.x_squares_P, x_NP.square().sum(dim=0), rtol=1e-5)
