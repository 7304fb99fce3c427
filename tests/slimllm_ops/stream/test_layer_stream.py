"""Hidden states that pass a model layer by layer are those of the whole model, each branch being run once."""

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import Branch, family_of, layer_shape
from slimllm_ops.moments.sums import DensePass
from slimllm_ops.stream import layer_stream as stream_module
from slimllm_ops.stream.layer_stream import LayerStream
from tests.slimllm_ops.naive import masked_model, observations, random_channels, random_decision

CPU = torch.device("cpu")
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def batches(ids: torch.Tensor) -> list[torch.Tensor]:
    """Batches of unequal size, as the last one of a shard is."""
    return [ids[:3], ids[3:5]]


@pytest.fixture
def stream(model_dir: Path, batches: list[torch.Tensor]) -> LayerStream:
    return LayerStream(Checkpoint.open(model_dir), batches, CPU)


class Whole:
    """What the whole model computes: each layer's output, and what enters its modules."""

    def __init__(self, model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
        self.entered: dict[str, list[torch.Tensor]] = {}
        layers = model.get_submodule(family_of(model.config).layers)
        self.states: list[list[torch.Tensor]] = [[] for _ in range(NUM_LAYERS + 1)]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._noter(name), with_kwargs=True)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._keeper(index + 1))
        with torch.inference_mode():
            outputs = [model(ids, labels=ids) for ids in batches]
        self.states[0] = self.entered[f"{family_of(model.config).layers}.0"]
        self.losses = [float(output.loss) for output in outputs]

    def _noter(self, name: str) -> Any:
        def note(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
            given = (*arguments, *keywords.values())
            self.entered.setdefault(name, []).append(given[0])

        return note

    def _keeper(self, index: int) -> Any:
        def keep(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            self.states[index].append(output)

        return keep


def whole(directory: Path, batches: list[torch.Tensor]) -> Whole:
    return Whole(AutoModelForCausalLM.from_pretrained(directory).eval(), batches)


def rows(batches: list[torch.Tensor]) -> np.ndarray:
    """Return the rows of all batches (N, ·), be they (b, T, ·) or flat already."""
    return torch.cat([batch.flatten(0, -2) for batch in batches]).double().numpy()


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


def test_what_is_observed_are_the_moments_of_what_enters_the_output_projection(
    stream: LayerStream, model_dir: Path, batches: list[torch.Tensor]
) -> None:
    entered = whole(model_dir, batches).entered
    family = stream.checkpoint.family
    for layer in range(NUM_LAYERS):
        for branch in (family.attention, family.mlp):
            observed = stream.observe(layer, branch)
            if branch.reading.experts is not None:
                # Those of experts are looked at in `test_routing.py`.
                stream.apply(layer, branch, None)
                continue
            prefix = f"{family.layers}.{layer}"
            x_NP = rows(entered[f"{prefix}.{branch.output}"])
            input_ND = rows(entered[f"{prefix}.{branch.inputs[0]}"])
            covariance_PP = np.cov(x_NP, rowvar=False, bias=True)
            moments = observed.moments.unpack()
            assert moments.count == len(x_NP)
            np.testing.assert_allclose(moments.mean_P, x_NP.mean(axis=0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(moments.covariance_PP, covariance_PP, atol=1e-6 * np.abs(covariance_PP).max())
            np.testing.assert_allclose(observed.input_squares_D, (input_ND**2).sum(axis=0), rtol=1e-5)
            stream.apply(layer, branch, None)


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


def pass_deciding(stream: LayerStream, layer: int) -> None:
    """Pass a layer as `slimllm` does: what came out waits for its decision."""
    stream.observe(layer, stream.checkpoint.family.attention)
    stream.apply(layer, stream.checkpoint.family.attention, None)
    stream.observe(layer, stream.checkpoint.family.mlp)
    shape = layer_shape(stream.checkpoint.config, layer)
    stream.apply(layer, stream.checkpoint.family.mlp, random_channels(0, range(24), shape))


def pass_dense(stream: LayerStream, layer: int) -> None:
    """Pass a layer as `gram` does: nothing waits."""
    stream.observe_dense(layer, stream.checkpoint.family.attention)
    stream.observe_dense(layer, stream.checkpoint.family.mlp)


@pytest.mark.parametrize("pass_layer", [pass_deciding, pass_dense])
def test_each_branch_is_run_once_for_every_layer_and_batch(
    stream: LayerStream, batches: list[torch.Tensor], pass_layer: Callable[[LayerStream, int], None]
) -> None:
    runs: Counter[tuple[int, str]] = Counter()
    branches = (stream.checkpoint.family.attention, stream.checkpoint.family.mlp)
    names = [name for branch in branches for name in run_in(branch)]
    names += [branch.output for branch in branches if branch.reading.experts is None]

    def count(layer: int, name: str) -> Any:
        return lambda *_: runs.update([(layer, name)])

    for index, layer in enumerate(stream._layers()):
        for name in names:
            layer.get_submodule(name).register_forward_pre_hook(count(index, name))
    for layer in range(NUM_LAYERS):
        pass_layer(stream, layer)
    # The output projections are left out of the branches: only their weights are used.
    inputs = [name for branch in branches for name in run_in(branch)]
    assert runs == {(layer, name): len(batches) for layer in range(NUM_LAYERS) for name in inputs}


def run_in(branch: Branch) -> tuple[str, ...]:
    """Return the modules of a branch that are run as modules; of experts, the router."""
    return branch.inputs if branch.reading.experts is None else (branch.reading.experts.router,)


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
            assert (observed.gain == 1) == (branch.reading.output_norm is None and stream._multiplier == 1)
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
    assert merged.observed.gain == pytest.approx(together.observed.gain, rel=1e-6)
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
    monkeypatch.setattr(stream, "_load", None)
    before = list(stream.hidden)
    stream.forward_pruned(1, LayerPlan(dropped=True))
    assert all(map(torch.equal, stream.hidden, before))


def test_the_next_layer_is_read_while_this_one_is_at_work(stream: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [threading.Event() for _ in range(NUM_LAYERS)], Checkpoint.read_layer

    def noted(self: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
        read[layer].set()
        return original(self, layer)

    monkeypatch.setattr(Checkpoint, "read_layer", noted)
    stream.forward(0)
    assert read[1].wait(timeout=10)
    assert not read[2].is_set()


def test_a_layer_is_read_once(stream: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[int] = Counter()
    original = Checkpoint.read_layer

    def counted(self: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
        read[layer] += 1
        return original(self, layer)

    monkeypatch.setattr(Checkpoint, "read_layer", counted)
    for layer in range(NUM_LAYERS):
        for branch in (stream.checkpoint.family.attention, stream.checkpoint.family.mlp):
            stream.observe(layer, branch)
            stream.weights(layer)
            stream.apply(layer, branch, None)
    assert read == {0: 1, 1: 1, 2: 1}


def test_only_the_layer_that_is_passed_has_weights(stream: LayerStream) -> None:
    def in_memory() -> set[str]:
        names = {name for name, parameter in stream._model.named_parameters() if not parameter.is_meta}
        depth = layers.count(".") + 2
        return {".".join(name.split(".")[:depth]) for name in names}

    layers = stream.checkpoint.family.layers
    assert in_memory() == set()
    for layer in range(NUM_LAYERS):
        stream.forward(layer)
        assert in_memory() == {f"{layers}.{layer}"}
    stream.negative_log_likelihood()
    assert in_memory() == set()


def test_a_layers_weights_are_those_of_the_checkpoint(stream: LayerStream) -> None:
    stored = stream.checkpoint.read_layer(1)
    weights = stream.weights(1)
    assert set(weights) == set(stored)
    assert all(torch.equal(weights[name], stored[name]) for name in stored)


def test_states_may_be_passed_again(stream: LayerStream) -> None:
    stream.forward(0)
    first = [state.clone() for state in stream.hidden]
    again = LayerStream(stream.checkpoint, stream.batches, CPU)
    again.forward(0)
    assert all(torch.equal(one, other) for one, other in zip(first, again.hidden, strict=True))


@pytest.mark.parametrize("way", ["forward", "observe"])
def test_activations_that_overflow_are_an_error_that_names_the_layer(
    mha_model: Path, tmp_path: Path, batches: list[torch.Tensor], way: str
) -> None:
    directory = shutil.copytree(mha_model, tmp_path / "copy")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    stream = LayerStream(Checkpoint.open(directory), batches, CPU)
    stream.forward(0)
    arguments = {"forward": (), "observe": (stream.checkpoint.family.mlp,)}[way]
    with pytest.raises(NonFiniteError, match=r"layer 1: the activations of .* hold NaN or infinity"):
        getattr(stream, way)(1, *arguments)
