"""Decisions about a layer from the stream's observation match raw activations of the model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.paper import decide_heads
from slimllm_ops.decide.plan import Decision
from slimllm_ops.models.families import family_of, layer_shape
from slimllm_ops.moments.observation import Observed
from slimllm_ops.stream.outputs import LayerwiseStream
from tests.slimllm_ops import naive
from tests.slimllm_ops.pruned import prune_mlp

LAYER = 1


def activations(directory: Path, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Return what enters each projection of a layer of the whole model, as rows."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    family = family_of(model.config)
    entered: dict[str, np.ndarray] = {}

    def noter(name: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
            entered[name] = arguments[0].flatten(0, -2).double().numpy()

        return note

    layer = model.get_submodule(f"{family.layers}.{LAYER}")
    mlp = (family.mlp.inputs[0], family.mlp.output) if family.mlp.reading.experts is None else ()
    for name in (family.attention.output, *mlp):
        layer.get_submodule(name).register_forward_pre_hook(noter(name))
    with torch.inference_mode():
        model(ids)
    return entered


def assert_recovers(decision: Decision, x_NP: np.ndarray, weight_PD: np.ndarray) -> None:
    kept = naive.kept_columns(decision, x_NP.shape[1])
    scale_D, bias_D = naive.fit_lines(x_NP, weight_PD, kept)
    np.testing.assert_allclose(decision.recovery.scale_D, scale_D, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decision.recovery.bias_D, bias_D, rtol=1e-4, atol=1e-4)
    measured = naive.unexplained_fraction(x_NP, weight_PD, kept, scale_D, bias_D)
    assert decision.relative_error == pytest.approx(measured, rel=1e-4)


def open_stream(directory: Path, ids: torch.Tensor, *, intercept: bool = True) -> LayerwiseStream:
    """Return a stream that is about to pass the layer."""
    stream = LayerwiseStream(Checkpoint.open(directory), list(ids.split(7)), torch.device("cpu"), intercept=intercept)
    for layer in range(LAYER):
        stream.forward(layer)
    return stream


@pytest.fixture
def stream(model_dir: Path, ids: torch.Tensor) -> LayerwiseStream:
    return open_stream(model_dir, ids)


def observed_heads(
    stream: LayerwiseStream, model_dir: Path, ids: torch.Tensor
) -> tuple[int, Observed, np.ndarray, np.ndarray]:
    """Return the number of units, what the stream observed of them, and their activations and weight."""
    num_units = layer_shape(stream.checkpoint.config, LAYER).num_attention_units
    branch = stream.checkpoint.family.attention
    if branch.reading.whole:
        pytest.skip(branch.reading.whole)
    observed = stream.observe(LAYER, branch)
    x_NP = activations(model_dir, ids)[branch.output]
    weight_PD = stream.checkpoint.read_layer(LAYER)[branch.output_weight].T.double().numpy()
    return num_units, observed, x_NP, weight_PD


def test_the_kept_heads_are_those_of_raw_activations(
    stream: LayerwiseStream, model_dir: Path, ids: torch.Tensor
) -> None:
    num_units, observed, x_NP, weight_PD = observed_heads(stream, model_dir, ids)
    for num_removed in range(1, num_units):
        decision = decide_heads(stream, observed, LAYER, num_removed=num_removed)
        expected, _, _ = naive.choose_heads(x_NP, weight_PD, num_units, num_removed)
        assert list(decision.kept) == expected
        assert (decision.num_units, decision.num_removed) == (num_units, num_removed)
        assert_recovers(decision, x_NP, weight_PD)


def test_the_scores_of_heads_say_what_the_output_loses_without_them(
    stream: LayerwiseStream, model_dir: Path, ids: torch.Tensor
) -> None:
    num_units, observed, x_NP, weight_PD = observed_heads(stream, model_dir, ids)
    lost = [
        1
        - naive.similarity(x_NP, weight_PD, num_units, [u for u in range(num_units) if u != unit]) / weight_PD.shape[1]
        for unit in range(num_units)
    ]
    scores = decide_heads(stream, observed, LAYER, num_removed=1).scores
    np.testing.assert_allclose(scores, lost, rtol=1e-4, atol=1e-7)
    # Without the exchange, the head that matters least would go.
    assert int(np.argmin(scores)) == int(np.argmin(lost))


def test_the_kept_channels_are_those_of_raw_activations(
    stream: LayerwiseStream, model_dir: Path, ids: torch.Tensor
) -> None:
    family = stream.checkpoint.family
    if family.mlp.reading.experts is not None:
        pytest.skip("its experts are looked at in test_experts.py")
    stream.observe(LAYER, family.attention)
    stream.apply(LAYER, family.attention, None)
    decision = prune_mlp(stream, LAYER)

    entered, weights = activations(model_dir, ids), stream.checkpoint.read_layer(LAYER)
    weight_PD = weights[family.mlp.output_weight].T.double().numpy()
    # Gate and up may be stored as one, the one after the other.
    inputs = [part.double().numpy() for name in family.mlp.input_weights for part in weights[name].split(48)]
    scores = naive.channel_scores(entered[family.mlp.output], weight_PD, entered[family.mlp.inputs[0]], inputs)
    np.testing.assert_allclose(decision.scores, scores, rtol=1e-4)
    ascending = np.argsort(scores, kind="stable").tolist()
    # 5 % of 48 channels are 2.4.
    assert list(decision.kept) == sorted(ascending[:2] + ascending[2 + 17 :])
    assert_recovers(decision, entered[family.mlp.output], weight_PD)


@pytest.mark.parametrize("decide", ["heads", "channels"])
def test_without_an_intercept_lines_go_through_zero(model_dir: Path, ids: torch.Tensor, decide: str) -> None:
    stream = open_stream(model_dir, ids, intercept=False)
    family, num_units = stream.checkpoint.family, layer_shape(stream.checkpoint.config, LAYER).num_attention_units
    branch = family.attention
    observed = stream.observe(LAYER, branch)
    if decide == "channels" and family.mlp.reading.experts is not None:
        pytest.skip("its experts are looked at in test_experts.py")
    if decide == "channels":
        stream.apply(LAYER, branch, None)
        branch = family.mlp
        decision = prune_mlp(stream, LAYER)
    elif num_units == 1:
        pytest.skip("no head of this family can go")
    else:
        decision = decide_heads(stream, observed, LAYER, num_removed=1)
    x_NP = activations(model_dir, ids)[branch.output]
    weight_PD = stream.checkpoint.read_layer(LAYER)[branch.output_weight].T.double().numpy()
    kept = naive.kept_columns(decision, x_NP.shape[1])
    y_ND, kept_ND = x_NP @ weight_PD, x_NP[:, kept] @ weight_PD[kept]
    scale_D = (y_ND * kept_ND).sum(axis=0) / (kept_ND**2).sum(axis=0)
    np.testing.assert_allclose(decision.recovery.scale_D, scale_D, rtol=1e-4, atol=1e-4)
    assert not decision.with_bias
    assert not decision.recovery.bias_D.any()
