"""Hidden states that run layer by layer equal those of the whole model, and each branch runs once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import FAMILIES, Family, layer_shape
from slimllm_ops.moments.sums import DensePass
from slimllm_ops.stream import passes as stream_module
from slimllm_ops.stream.outputs import LayerwiseStream
from slimllm_ops.stream.passes import LayerStream
from tests.slimllm_ops.naive import masked_model, observations, random_channels, random_decision
from tests.slimllm_ops.stream.whole import NUM_LAYERS, Whole, whole
from tests.tiny import first_of_build, save_tiny

CPU = torch.device("cpu")


def assert_states(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        # Rounding is relative to what was summed, which for some values is much more than what is left of it.
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_states_are_the_whole_models_after_every_layer(
    stream: LayerStream, model_dir: Path, batches: list[torch.Tensor]
) -> None:
    expected = whole(model_dir, batches)
    assert_states(stream.hidden, expected.states[0])
    for layer in range(NUM_LAYERS):
        stream.forward(layer)
        assert_states(stream.hidden, expected.states[layer + 1])


@pytest.mark.parametrize("family", [one for one in FAMILIES if not first_of_build(one)], ids=lambda one: one.name)
def test_states_and_likelihood_of_the_other_families_are_the_whole_models_too(
    family: Family, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    expected = Whole(AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path)).eval(), batches)
    stream = LayerStream(Checkpoint.open(tmp_path), batches, CPU)
    for layer in range(NUM_LAYERS):
        stream.forward(layer)
        assert_states(stream.hidden, expected.states[layer + 1])
    weights = [ids.shape[0] * (ids.shape[1] - 1) for ids in batches]
    assert stream.negative_log_likelihood().value == pytest.approx(np.average(expected.losses, weights=weights), 1e-6)


def test_the_likelihood_is_the_whole_models_loss(
    stream: LayerStream, model_dir: Path, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less than a batch's tokens, so that logits are computed in parts, as they are for real models.
    monkeypatch.setattr(stream_module, "LOGIT_TOKENS", 7)
    for layer in range(NUM_LAYERS):
        stream.forward(layer)
    found = stream.negative_log_likelihood()
    counts = [ids.shape[0] * (ids.shape[1] - 1) for ids in batches]
    losses = whole(model_dir, batches).losses
    assert found.count == sum(counts)
    assert found.value == pytest.approx(np.average(losses, weights=counts), rel=1e-6)


def test_similarity_is_the_mean_cosine_of_a_layers_input_and_output(
    stream: LayerStream, model_dir: Path, batches: list[torch.Tensor]
) -> None:
    states = [torch.cat(state).double().flatten(0, 1).numpy() for state in whole(model_dir, batches).states]
    for layer in range(NUM_LAYERS):
        before, after = states[layer], states[layer + 1]
        cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(before, after, strict=True)]
        found = stream.forward(layer)
        assert found.count == len(cosines)
        assert found.value == pytest.approx(np.mean(cosines), rel=1e-6)


def test_observations_of_shards_merge_to_that_of_all_tokens(model_dir: Path, batches: list[torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(model_dir)
    branch = checkpoint.family.attention
    one, other = (LayerStream(checkpoint, [ids], CPU).observe(0, branch) for ids in batches)
    together = LayerStream(checkpoint, batches, CPU).observe(0, branch)
    merged, expected = one.merge(other).unpack(CPU), together.unpack(CPU)
    assert merged.moments.count == expected.moments.count
    torch.testing.assert_close(merged.moments.mean_P, expected.moments.mean_P, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(merged.moments.covariance_PP, expected.moments.covariance_PP, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(merged.input_squares_D, expected.input_squares_D, rtol=1e-6, atol=0)


def test_observing_and_applying_nothing_is_passing_the_layer(
    stream: LayerStream, model_dir: Path, batches: list[torch.Tensor]
) -> None:
    expected = whole(model_dir, batches)
    for layer in range(NUM_LAYERS):
        for branch in (stream.checkpoint.family.attention, stream.checkpoint.family.mlp):
            stream.observe(layer, branch)
            stream.apply(layer, branch, None)
        assert_states(stream.hidden, expected.states[layer + 1], tolerance=1e-5)


def plans_for(stream: LayerStream) -> list[LayerPlan]:
    """Return plans that prune both branches, one, the other."""
    shape = layer_shape(stream.checkpoint.config, 0)
    num_units, channels = shape.num_attention_units, range(1, 48, 2)
    kept = {4: (0, 3), 2: (1,), 1: ()}[num_units]
    return [
        LayerPlan(attention=random_decision(0, kept, num_units), mlp=random_channels(1, channels, shape)),
        LayerPlan(mlp=random_channels(2, channels, shape)),
        LayerPlan(attention=random_decision(3, kept, num_units)),
    ]


def test_applying_decisions_gives_the_states_of_the_masked_model(
    stream: LayerStream, model_dir: Path, batches: list[torch.Tensor]
) -> None:
    plans = plans_for(stream)
    family = stream.checkpoint.family
    expected = Whole(masked_model(model_dir, plans), batches)
    for layer, plan in enumerate(plans):
        for branch, decision in ((family.attention, plan.attention), (family.mlp, plan.mlp)):
            stream.observe(layer, branch)
            power = stream.apply(layer, branch, decision)
        assert_states(stream.hidden, expected.states[layer + 1], tolerance=1e-5)
        squares = torch.cat(expected.states[layer + 1]).double().square().sum(dim=-1)
        assert power.count == squares.numel()
        assert power.value == pytest.approx(float(squares.mean()), rel=1e-5)


def test_passing_a_layer_pruned_is_observing_and_applying(stream: LayerStream, model_dir: Path) -> None:
    observing = LayerStream(stream.checkpoint, stream.batches, CPU)
    for layer, plan in enumerate(plans_for(stream)):
        stream.forward_pruned(layer, plan)
        for branch, decision in (
            (stream.checkpoint.family.attention, plan.attention),
            (stream.checkpoint.family.mlp, plan.mlp),
        ):
            observing.observe(layer, branch)
            observing.apply(layer, branch, decision)
        assert all(torch.equal(one, other) for one, other in zip(stream.hidden, observing.hidden, strict=True))


def test_observing_a_dense_branch_is_observing_and_applying_it(stream: LayerStream) -> None:
    holding = LayerStream(stream.checkpoint, stream.batches, CPU)
    for layer in range(NUM_LAYERS):
        for branch in (stream.checkpoint.family.attention, stream.checkpoint.family.mlp):
            found = stream.observe_dense(layer, branch)
            observed = found.observed
            expected = holding.observe(layer, branch)
            for one, other in zip(*map(observations, (observed, expected)), strict=True):
                assert all(map(np.array_equal, one.moments.rows, other.moments.rows))
                assert np.array_equal(one.input_squares_D, other.input_squares_D)
            assert found.power == holding.apply(layer, branch, None)
            assert found.change is None
        assert all(torch.equal(one, other) for one, other in zip(stream.hidden, holding.hidden, strict=True))


def test_what_a_layer_changes_is_the_distance_of_what_leaves_it_from_what_enters_it(stream: LayerStream) -> None:
    measuring = LayerStream(stream.checkpoint, stream.batches, CPU, measures_change=True)
    for layer in range(NUM_LAYERS):
        before = list(stream.hidden)
        for branch in (stream.checkpoint.family.attention, stream.checkpoint.family.mlp):
            found = measuring.observe_dense(layer, branch)
            assert found.power == stream.observe_dense(layer, branch).power
        changes = [after - entered for after, entered in zip(stream.hidden, before, strict=True)]
        expected = sum(float(change.double().square().sum()) for change in changes)
        assert found.change is not None
        assert found.change.total == pytest.approx(expected, rel=1e-5)
        assert found.change.count == sum(ids.numel() for ids in stream.batches)


def test_dense_passes_of_shards_merge_to_that_of_all_tokens(model_dir: Path, batches: list[torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(model_dir)
    branch = checkpoint.family.attention

    def passed(batches: list[torch.Tensor], measures_change: bool = True) -> DensePass:
        return LayerStream(checkpoint, batches, CPU, measures_change=measures_change).observe_dense(0, branch)

    merged, together = passed(batches[:1]).merge(passed(batches[1:])), passed(batches)
    assert merged.change is not None
    assert together.change is not None
    for one, other in ((merged.power, together.power), (merged.change, together.change)):
        assert one.count == other.count
        assert one.total == pytest.approx(other.total, rel=1e-6)
    merged.observed.require_tokens(sum(ids.numel() for ids in batches))
    assert passed(batches[:1]).merge(passed(batches[1:], measures_change=False)).change is None


def test_the_probe_is_the_states_of_the_first_tokens(stream: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    stream.forward(0)
    # A block of fewer tokens is shown whole.
    assert stream.probe().shape == (stream.batches[0].shape[1], 32)
    monkeypatch.setattr(stream_module, "PROBED_TOKENS", 5)
    assert np.array_equal(stream.probe(), stream.hidden[0][0, :5].numpy())
    assert stream.probe().dtype == np.float32
    assert np.array_equal(stream.probed_ids(), stream.batches[0][0, :5].numpy())


def test_a_layer_that_is_dropped_changes_nothing_and_is_not_read(
    stream: LayerStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream._weights, "load", None)
    before = list(stream.hidden)
    stream.forward_pruned(1, LayerPlan(dropped=True))
    assert all(map(torch.equal, stream.hidden, before))


def test_states_may_be_passed_again(stream: LayerStream) -> None:
    stream.forward(0)
    first = [state.clone() for state in stream.hidden]
    again = LayerStream(stream.checkpoint, stream.batches, CPU)
    again.forward(0)
    assert all(torch.equal(one, other) for one, other in zip(first, again.hidden, strict=True))


@pytest.mark.parametrize("way", ["forward", "observe", "observe_output"])
def test_activations_that_overflow_are_an_error_that_names_the_layer(
    mha_model: Path, tmp_path: Path, batches: list[torch.Tensor], way: str
) -> None:
    directory = shutil.copytree(mha_model, tmp_path / "copy")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    stream = LayerwiseStream(Checkpoint.open(directory), batches, CPU)
    stream.forward(0)
    arguments = (stream.checkpoint.family.mlp,) if way == "observe" else ()
    with pytest.raises(NonFiniteError, match=r"layer 1: the activations of .* hold NaN or infinity"):
        getattr(stream, way)(1, *arguments)
