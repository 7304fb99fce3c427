"""Decisions about experts match each one's raw activations, and an expert without tokens is handled."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimllm_ops.allocate.layer_size import measure_layer
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.paper import decide_experts
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.decide.recovery import Line
from slimllm_ops.errors import SolveError
from slimllm_ops.methods import METHODS
from slimllm_ops.models.families import Branch
from slimllm_ops.module_solves import decide_module, eliminate_module, rank_module
from slimllm_ops.moments.routing import PackedExperts
from slimllm_ops.stream.passes import LayerStream
from tests.slimllm_ops import naive
from tests.slimllm_ops.moments.test_routing import LAYER, mixture, observe

__all__ = ["mixture"]

CHANNELS, REMOVED = 48, 17
IDLE = 2
GRAM = METHODS["gram"]

Seen = tuple[PackedExperts, LayerStream, Branch]


@pytest.fixture
def seen(mixture: Path, ids: torch.Tensor) -> Seen:
    """What was observed of a layer's experts, the stream that passes the layer, and the branch."""
    observed, stream = observe(mixture, list(ids.split(7)))
    return observed, stream, stream.family.mlp


@pytest.fixture
def activations(mixture: Path, ids: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    return naive.expert_activations(mixture, ids, LAYER)


def without(observed: PackedExperts, *idle: int) -> PackedExperts:
    """Return observations in which no token has reached some experts."""
    experts = [None if expert in idle else one for expert, one in enumerate(observed.experts)]
    return replace(observed, experts=tuple(experts))


def kept_by(decision: Decision, num_experts: int) -> list[list[int]]:
    """Return the channels that each expert keeps: as many of each, and its own."""
    kept = np.array(decision.kept).reshape(num_experts, -1)
    assert (kept // CHANNELS == np.arange(num_experts)[:, None]).all()
    return (kept % CHANNELS).tolist()


def test_scores_and_lines_are_those_of_each_experts_raw_activations(
    seen: Seen, activations: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    observed, stream, branch = seen
    weights = stream.checkpoint.read_layer(LAYER)
    decision = decide_experts(stream, observed, LAYER, num_removed=REMOVED, keep_lowest=0.05)
    (gate_up,) = (weights[name].double().numpy() for name in branch.input_weights)
    output = weights[branch.output_weight].double().numpy()
    assert isinstance(decision.recovery, Line)
    assert not decision.with_bias
    assert not decision.recovery.bias_D.any()
    lost = total = 0.0
    for expert, (x_NI, input_ND) in enumerate(activations):
        weight_ID = output[expert].T
        scores = naive.channel_scores_through_zero(x_NI, weight_ID, input_ND, np.split(gate_up[expert], 2))
        found = decision.scores[expert * CHANNELS : (expert + 1) * CHANNELS]
        np.testing.assert_allclose(found, scores, rtol=1e-4)
        ascending = np.argsort(scores, kind="stable").tolist()
        kept = kept_by(decision, len(activations))[expert]
        # 5 % of 48 channels are 2.4.
        assert kept == sorted(ascending[:2] + ascending[2 + REMOVED :])
        y_ND, kept_ND = x_NI @ weight_ID, x_NI[:, kept] @ weight_ID[kept]
        scale_D = (y_ND * kept_ND).sum(axis=0) / (kept_ND**2).sum(axis=0)
        np.testing.assert_allclose(decision.recovery.scale_D[expert], scale_D, rtol=1e-4, atol=1e-4)
        lost, total = lost + ((y_ND - kept_ND * scale_D) ** 2).sum(), total + (y_ND**2).sum()
    assert decision.relative_error == pytest.approx(lost / total, rel=1e-4)


def eliminated(seen: Seen, *removals: int) -> tuple[list[Decision | None], tuple[float, ...]]:
    observed, stream, branch = seen
    weights = stream.checkpoint.read_layer(LAYER)
    weight_EDI = weights[branch.output_weight]
    ranking = eliminate_module(weight_EDI, observed, CHANNELS, None).ranking
    numbers = [number * len(weight_EDI) for number in removals]
    return decide_module(weight_EDI, observed, GRAM, ranking, numbers), ranking.costs


def test_gram_eliminates_and_refits_each_expert_over_its_own_tokens(
    seen: Seen, activations: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    (none, decision), _ = eliminated(seen, 0, REMOVED)
    assert none is None
    assert decision is not None
    assert isinstance(decision.recovery, Refit)
    weight_EDI = seen[1].checkpoint.read_layer(LAYER)[seen[2].output_weight].double().numpy()
    fitted = decision.recovery.weight_SD.double().numpy().reshape(len(activations), CHANNELS - REMOVED, -1)
    lost = total = 0.0
    for expert, (x_NI, _) in enumerate(activations):
        weight_ID, kept = weight_EDI[expert].T, kept_by(decision, len(activations))[expert]
        d = 0.01 * float((x_NI**2).mean())
        expected = naive.ridge_fit_through_zero(x_NI, weight_ID, kept, d)
        np.testing.assert_allclose(fitted[expert], expected, rtol=1e-3, atol=1e-4)
        lost += ((x_NI @ weight_ID - x_NI[:, kept] @ expected) ** 2).sum()
        total += ((x_NI @ weight_ID) ** 2).sum()
    assert decision.relative_error == pytest.approx(lost / total, rel=1e-2)


def test_costs_add_up_to_the_squared_error_per_token_of_the_stream(
    seen: Seen, activations: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    observed, stream, branch = seen
    weights = stream.checkpoint.read_layer(LAYER)
    weight_EDI = weights[branch.output_weight]
    path = eliminate_module(weight_EDI, observed, CHANNELS, None)
    ranking, power = path.ranking, path.output_variance
    expected = sum(((x_NI @ one.T) ** 2).sum() for (x_NI, _), one in zip(activations, weight_EDI.numpy(), strict=True))
    assert power == pytest.approx(expected / observed.count, rel=1e-5)
    # The first channel that an expert loses, with the ridge's share of what its fit is held to.
    for expert, (x_NI, _) in enumerate(activations):
        unit, cost = ranking.order[expert], ranking.costs[expert]
        assert unit // CHANNELS == expert
        kept = [channel for channel in range(CHANNELS) if channel != unit % CHANNELS]
        weight_ID, d = weight_EDI[expert].T.double().numpy(), 0.01 * float((x_NI**2).mean())
        residual = naive.ridge_residual_through_zero(x_NI, weight_ID, kept, d)
        assert cost == pytest.approx(residual * len(x_NI) / observed.count, rel=1e-3)


def test_one_channel_of_each_expert_goes_at_a_time(seen: Seen) -> None:
    observed, stream, branch = seen
    weights = stream.checkpoint.read_layer(LAYER)
    for method in METHODS.values():
        ranking = rank_module(weights[branch.output_weight], observed, CHANNELS, None, method)
        experts = np.array(ranking.order).reshape(CHANNELS, -1) // CHANNELS
        assert (experts == np.arange(len(observed.experts))).all()
        assert sorted(ranking.order) == list(range(CHANNELS * len(observed.experts)))


@pytest.mark.parametrize("way", ["paper", "gram"])
def test_an_expert_without_tokens_loses_its_smallest_weights_and_nothing_else_changes(seen: Seen, way: str) -> None:
    observed, stream, branch = seen
    weights = stream.checkpoint.read_layer(LAYER)
    num_experts = len(observed.experts)

    def decide(observed: PackedExperts) -> Decision:
        if way == "gram":
            decision = eliminated((observed, stream, branch), REMOVED)[0][0]
            assert decision is not None
            return decision
        return decide_experts(stream, observed, LAYER, num_removed=REMOVED, keep_lowest=0.0)

    whole, decision = decide(observed), decide(without(observed, IDLE))
    assert (whole.idle_experts, decision.idle_experts) == ((), (IDLE,))
    assert np.isfinite(decision.scores).all()
    assert np.isfinite(decision.relative_error)
    kept, others = kept_by(decision, num_experts), kept_by(whole, num_experts)
    assert [one for e, one in enumerate(kept) if e != IDLE] == [one for e, one in enumerate(others) if e != IDLE]
    weight_DI = weights[branch.output_weight][IDLE]
    norms = weight_DI.norm(dim=0)
    if way == "paper":
        norms = norms + sum(part.norm(dim=1) for part in weights[branch.input_weights[0]][IDLE].split(CHANNELS))
    assert kept[IDLE] == sorted(norms.argsort()[REMOVED:].tolist())
    restored = recovered(decision, weights[branch.output_weight])
    assert restored.isfinite().all()
    torch.testing.assert_close(restored[IDLE], weight_DI[:, kept[IDLE]])


def recovered(decision: Decision, weight_EDI: torch.Tensor) -> torch.Tensor:
    """Return the experts' new output weights (E, D, S)."""
    kept_DS = naive.flat(weight_EDI)[:, list(decision.kept)]
    assert decision.recovery is not None
    return decision.recovery.restore(kept_DS.T).T.unflatten(1, (len(weight_EDI), -1)).transpose(0, 1)


@pytest.mark.parametrize("way", ["paper", "gram"])
def test_an_expert_of_one_token_is_decided_too(mixture: Path, ids: torch.Tensor, way: str) -> None:
    """Of four tokens, some experts get one, and some none."""
    observed, stream = observe(mixture, [ids[:1, :4]])
    assert min(observed.share(expert) for expert in range(len(observed.experts))) <= 1 / 4
    weights, branch = stream.checkpoint.read_layer(LAYER), stream.checkpoint.family.mlp
    if way == "gram":
        (decision,) = eliminated((observed, stream, branch), REMOVED)[0]
    else:
        decision = decide_experts(stream, observed, LAYER, num_removed=REMOVED, keep_lowest=0.05)
    assert decision is not None
    assert recovered(decision, weights[branch.output_weight]).isfinite().all()
    stream.apply(LAYER, branch, decision)
    assert all(hidden.isfinite().all() for hidden in stream.hidden)


def test_a_solve_that_fails_names_the_expert(seen: Seen) -> None:
    observed, stream, branch = seen
    weights = stream.checkpoint.read_layer(LAYER)
    one = observed.experts[1]
    assert one is not None
    rows = tuple(-row for row in one.moments.rows)
    broken = replace(one, moments=replace(one.moments, rows=rows, mean_P=0 * one.moments.mean_P))
    observed = replace(observed, experts=(observed.experts[0], broken, *observed.experts[2:]))
    with pytest.raises(SolveError, match=r"^expert 1: the covariance of 48 inputs cannot be factorised"):
        eliminate_module(weights[branch.output_weight], observed, CHANNELS, None)


def test_a_decision_about_experts_is_read_as_it_was_written(seen: Seen) -> None:
    observed, stream, _ = seen
    decision = decide_experts(stream, without(observed, 0, 3), LAYER, num_removed=REMOVED, keep_lowest=0.05)
    found = LayerPlan.parse(LayerPlan(mlp=decision).describe()).mlp
    assert found is not None
    assert (found.kept, found.scores, found.idle_experts) == (decision.kept, decision.scores, (0, 3))
    assert torch.equal(found.recovery.scale_D, decision.recovery.scale_D)
    assert (found.with_bias, found.relative_error) == (False, decision.relative_error)


def test_a_layer_is_passed_again_by_what_was_read(mixture: Path, ids: torch.Tensor) -> None:
    """A run of the paper's method that is resumed passes the layers that are solved by their plans."""
    observed, stream = observe(mixture, [ids])
    branch = stream.checkpoint.family.mlp
    decision = decide_experts(stream, observed, LAYER, num_removed=REMOVED, keep_lowest=0.05)
    stream.apply(LAYER, branch, decision)
    again = LayerStream(stream.checkpoint, [ids], torch.device("cpu"))
    for layer in range(LAYER):
        again.forward(layer)
    again.forward_pruned(LAYER, LayerPlan.parse(json.loads(json.dumps(LayerPlan(mlp=decision).describe()))))
    torch.testing.assert_close(again.hidden[0], stream.hidden[0], rtol=1e-5, atol=1e-5)


def channels_that_differ(kept: Sequence[Sequence[int]]) -> int:
    return len({tuple(one) for one in kept})


def test_experts_keep_other_channels_than_each_other(seen: Seen) -> None:
    (decision,), _ = eliminated(seen, REMOVED)
    assert decision is not None
    assert channels_that_differ(kept_by(decision, len(seen[0].experts))) == len(seen[0].experts)


def test_layers_of_a_mixture_are_read_merged_and_held_by_expert(mixture: Path) -> None:
    checkpoint = Checkpoint.open(mixture)
    names = checkpoint.layer_names(LAYER)
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in names)
    tensors = checkpoint.read_layer(LAYER)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == checkpoint.layer_shapes(LAYER)
    branch = checkpoint.family.mlp
    size, num_experts = measure_layer(checkpoint, LAYER), len(tensors[branch.output_weight])
    assert (size.num_channels, size.num_experts) == (CHANNELS, num_experts)
    assert size.channel_parameters == num_experts * 3 * 32
    # Experts get no bias; the attention's output projection does.
    assert (size.mlp_bias_parameters, size.attention_bias_parameters) == (0, 32)
    assert size.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert torch.equal(checkpoint.read_weight(LAYER, branch.output_weight), tensors[branch.output_weight])
