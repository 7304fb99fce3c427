"""A branch runs once, without its output projection, and returns that projection's input."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimllm_ops.models.families import Branch, layer_shape
from slimllm_ops.stream.branches import ExpertsBranch, PlainBranch
from slimllm_ops.stream.passes import LayerStream
from tests.slimllm_ops.naive import random_channels
from tests.slimllm_ops.stream.whole import NUM_LAYERS, whole


def rows(batches: list[torch.Tensor]) -> np.ndarray:
    """Return the rows of all batches (N, ·), be they (b, T, ·) or flat already."""
    return torch.cat([batch.flatten(0, -2) for batch in batches]).double().numpy()


def test_what_is_observed_are_the_moments_of_what_enters_the_output_projection(
    stream: LayerStream, model_dir: Path, batches: list[torch.Tensor]
) -> None:
    entered = whole(model_dir, batches).entered
    family = stream.checkpoint.family
    for layer in range(NUM_LAYERS):
        for branch in (family.attention, family.mlp):
            observed = stream.observe(layer, branch)
            if branch.has_experts:
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
    names += [branch.output for branch in branches if not branch.has_experts]

    def count(layer: int, name: str) -> Any:
        return lambda *_: runs.update([(layer, name)])

    for index, layer in enumerate(stream._weights.layers):
        for name in names:
            layer.get_submodule(name).register_forward_pre_hook(count(index, name))
    for layer in range(NUM_LAYERS):
        pass_layer(stream, layer)
    # The output projections are left out of the branches: only their weights are used.
    inputs = [name for branch in branches for name in run_in(branch)]
    assert runs == {(layer, name): len(batches) for layer in range(NUM_LAYERS) for name in inputs}


def run_in(branch: Branch) -> tuple[str, ...]:
    """Return the modules of a branch that are run as modules; of experts, the router."""
    return branch.inputs if not branch.has_experts else (branch.reading.experts.router,)


def test_a_branch_of_experts_is_told_from_a_plain_one(stream: LayerStream) -> None:
    attention, mlp = stream.family.attention, stream.family.mlp
    assert isinstance(stream.branch(0, attention), PlainBranch)
    kind = ExpertsBranch if stream.shape(0).num_experts > 1 else PlainBranch
    assert isinstance(stream.branch(0, mlp), kind)


@torch.inference_mode()
def test_the_change_of_an_output_is_told_from_the_change_of_what_it_adds(stream: LayerStream) -> None:
    run = stream.branch(0, stream.family.attention)
    output = run.projected(None)(run.run(run.normalise(stream.hidden[0])))
    change = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    # The divisor of a norm is held, which is right for changes that are small and across the output.
    change -= (change * output).sum(dim=-1, keepdim=True) / output.square().sum(dim=-1, keepdim=True) * output
    change *= 1e-2 * output.norm(dim=-1, keepdim=True) / change.norm(dim=-1, keepdim=True)
    added = run.contribution(output + change) - run.contribution(output)
    found = run.change_of_output(output, added)
    assert float((found - change).norm()) < 2e-2 * float(change.norm())
