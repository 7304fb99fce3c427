from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tensor_index import Place
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import NonFiniteError, SolveError
from slimllm_ops.models.families import Branch
from slimllm_ops.moments.moments import Moments
from slimllm_ops.stream.paired import BranchTensors
from slimllm_ops.stream.passes import LayerStream
from slimllm_ops.stream.refinement import MIX, RefinementStream, solve_alignment, solve_refit

CPU = torch.device("cpu")


def random_streams(num_tokens: int = 300, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a branch in the pruned stream, and in the dense one: a linear map of it and noise."""
    generator = torch.Generator().manual_seed(0)
    pruned = torch.randn(num_tokens, size, generator=generator) + torch.randn(size, generator=generator)
    dense = pruned @ torch.randn(size, size, generator=generator) + 0.1 * torch.randn(
        num_tokens, size, generator=generator
    )
    return pruned, dense


def test_the_alignment_is_ridge_regression_from_the_pruned_input_to_the_difference() -> None:
    pruned, dense = random_streams()
    found = solve_alignment(Moments.of(torch.cat([pruned, dense - pruned], dim=1)))

    x, y = pruned.double().numpy(), (dense - pruned).double().numpy()
    second = x.T @ x / len(x)
    ridge = 0.01 * np.diag(second).mean()
    expected = np.eye(6) + np.linalg.solve(second + ridge * np.eye(6), x.T @ y / len(x))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_an_aligned_projection_does_what_aligning_its_input_does(streams: tuple[LayerStream, LayerStream]) -> None:
    dense, pruned = streams
    torch.manual_seed(0)
    branch = dense.checkpoint.family.mlp
    weights = {name: pruned.weights(1)[name].clone() for name in branch.input_weights}
    pruned.hidden[0] = pruned.hidden[0] + torch.randn_like(pruned.hidden[0])
    refinement = RefinementStream(dense, pruned, range(3))
    observed = refinement.observe_inputs(1, branch)
    alignment = solve_alignment(observed.moments.unpack()).float()
    assert not torch.allclose(alignment, torch.eye(len(alignment)), atol=0.1)
    aligned = refinement.solve_alignment(observed, 1, branch)
    assert aligned.keys() == weights.keys()
    x = torch.randn(9, len(alignment))
    for name, weight in weights.items():
        found = x @ torch.from_numpy(aligned[name]).T
        torch.testing.assert_close(found, (x @ alignment) @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_refit_is_ridge_regression_held_to_the_weight_it_had(with_bias: bool) -> None:
    kept, target = random_streams()
    before = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    weight, bias = solve_refit(Moments.of(torch.cat([kept, target], dim=1)), before, with_bias)

    x, t, w = kept.double().numpy(), target.double().numpy(), before.double().numpy()
    centre = x.mean(0) if with_bias else 0.0
    offset = t.mean(0) if with_bias else 0.0
    second = (x - centre).T @ (x - centre) / len(x)
    cross = (x - centre).T @ (t - offset) / len(x)
    ridge = 0.01 * np.diag(second).mean()
    expected = w + np.linalg.solve(second + ridge * np.eye(6), cross - second @ w)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-5, atol=1e-6)
    if with_bias:
        assert bias is not None
        np.testing.assert_allclose(bias.numpy(), t.mean(0) - x.mean(0) @ expected, rtol=1e-4, atol=1e-5)
    else:
        assert bias is None


def test_inputs_that_are_all_zero_are_left_as_they_are() -> None:
    zeros = Moments(10, torch.zeros(8).double(), torch.zeros(8, 8).double())
    torch.testing.assert_close(solve_alignment(zeros), torch.eye(4).double())
    weight_SD = torch.randn(4, 4)
    torch.testing.assert_close(solve_refit(zeros, weight_SD, with_bias=False)[0], weight_SD.double())


def test_moments_that_are_no_moments_are_refused() -> None:
    broken = Moments(10, torch.zeros(4).double(), -0.1 * torch.eye(4).double())
    with pytest.raises(SolveError, match="eigenvalues"):
        solve_alignment(broken)


@pytest.fixture
def streams(gqa_model: Path, token_blocks: np.ndarray) -> tuple[LayerStream, LayerStream]:
    ids = torch.from_numpy(token_blocks.astype(np.int64))
    checkpoint = Checkpoint.open(gqa_model)
    return LayerStream(checkpoint, [ids], CPU), LayerStream(checkpoint, [ids], CPU)


def test_states_that_overflow_are_named_by_layer_and_module(streams: tuple[LayerStream, LayerStream]) -> None:
    refinement, branch = RefinementStream(*streams, range(3)), streams[0].checkpoint.family.mlp
    norm = streams[1].checkpoint.family.mlp.reading.norm
    streams[1].weights(0)[f"{norm}.weight"].data.mul_(1e30)
    for observe in (refinement.observe_inputs, refinement.observe_targets):
        with pytest.raises(NonFiniteError, match=r"layer 0: the activations of mlp hold NaN or infinity"):
            observe(0, branch)


def refine_branch(refinement: RefinementStream, layer: int, branch: Branch) -> BranchTensors:
    """Align and refit a branch as a run does; return its new tensors."""
    aligned = refinement.solve_alignment(refinement.observe_inputs(layer, branch), layer, branch)
    refinement.align(aligned, layer)
    refitted = refinement.solve_refit(refinement.observe_targets(layer, branch), layer, branch)
    refinement.apply(refitted, layer, branch)
    return aligned | refitted


def test_a_model_that_is_the_dense_one_is_left_as_it_is(
    streams: tuple[LayerStream, LayerStream], gqa_model: Path
) -> None:
    dense, pruned = streams
    refinement = RefinementStream(dense, pruned, range(3))
    family = dense.checkpoint.family
    for layer in range(dense.checkpoint.num_layers):
        before = {name: weight.clone() for name, weight in pruned.weights(layer).items()}
        for branch in (family.attention, family.mlp):
            observed = refinement.observe_inputs(layer, branch)
            alignment = solve_alignment(observed.moments.unpack())
            torch.testing.assert_close(alignment, torch.eye(len(alignment)).double(), rtol=0, atol=1e-5)
            refinement.align(refinement.solve_alignment(observed, layer, branch), layer)
            refitted = refinement.solve_refit(refinement.observe_targets(layer, branch), layer, branch)
            assert refitted.keys() == {branch.output_weight}
            weight_DS = torch.from_numpy(refitted[branch.output_weight])
            torch.testing.assert_close(weight_DS, before[branch.output_weight], rtol=1e-3, atol=1e-4)
            refinement.apply(refitted, layer, branch)
    torch.testing.assert_close(pruned.hidden[0], dense.hidden[0], rtol=1e-3, atol=1e-3)


def test_after_a_layer_that_was_dropped_the_stream_is_brought_back_to_the_dense_one(
    gqa_model: Path, token_blocks: np.ndarray, tmp_path: Path
) -> None:
    checkpoint, ids = Checkpoint.open(gqa_model), torch.from_numpy(token_blocks.astype(np.int64))
    writer, plans = CheckpointWriter(checkpoint, tmp_path), [LayerPlan(dropped=layer == 1) for layer in range(3)]
    writer.write_layer(0, plans[0])
    writer.write_layer(2, plans[2], 1)
    writer.finish(plans)
    dense, pruned = (LayerStream(model, [ids], CPU) for model in (checkpoint, Checkpoint.open(tmp_path)))
    refinement = RefinementStream(dense, pruned, (0, 2))
    refinement.forward_written(0, checkpoint)
    assert torch.equal(pruned.hidden[0], dense.hidden[0])
    refinement.forward_dropped(1)
    lost = float((pruned.hidden[0] - dense.hidden[0]).norm())
    assert lost
    for branch in (checkpoint.family.attention, checkpoint.family.mlp):
        refine_branch(refinement, 1, branch)
    expected = LayerStream(checkpoint, [ids], CPU)
    for layer in range(3):
        expected.forward(layer)
    torch.testing.assert_close(dense.hidden[0], expected.hidden[0])
    assert float((pruned.hidden[0] - dense.hidden[0]).norm()) < 0.9 * lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_passed_again_from_its_file_gives_the_same_bits(
    make_llama: Callable[..., Path], token_blocks: np.ndarray, tmp_path: Path, dtype: torch.dtype
) -> None:
    ids = torch.from_numpy(token_blocks.astype(np.int64))
    checkpoint = Checkpoint.open(make_llama(dtype=dtype, num_key_value_heads=2))
    first, again = (
        RefinementStream(*(LayerStream(checkpoint, [ids], CPU) for _ in range(2)), range(3)) for _ in range(2)
    )
    family = checkpoint.family
    tensors = checkpoint.read_layer(0)
    for stream in (first, again):
        stream.pruned.hidden[0] = stream.pruned.hidden[0] * 1.1
    for branch in (family.attention, family.mlp):
        solved = refine_branch(first, 0, branch)
        rounded = {name: torch.from_numpy(array).to(dtype) for name, array in solved.items()}
        for name, array in solved.items():
            assert np.array_equal(rounded[name].float().numpy(), array), f"{name} is not rounded to {dtype}"
        tensors |= rounded
    CheckpointWriter(checkpoint, tmp_path).write_tensors(0, tensors)
    (path,) = tmp_path.glob("*.safetensors")
    files = {name: Place(path.name, name) for name in load_file(path)}
    again.forward_written(0, replace(checkpoint, directory=tmp_path, files=files))
    assert torch.equal(again.pruned.hidden[0], first.pruned.hidden[0])
    assert not torch.equal(again.pruned.hidden[0], again._dense.hidden[0])


def test_the_target_lies_between_the_whole_branch_and_the_dense_stream(
    streams: tuple[LayerStream, LayerStream], make_llama: Callable[..., Path]
) -> None:
    dense, pruned = streams
    branch = dense.checkpoint.family.mlp
    pruned.hidden = [hidden + 0.1 for hidden in pruned.hidden]
    refinement = RefinementStream(dense, pruned, range(3))
    before, drifted = dense.hidden[0].clone(), pruned.hidden[0].clone()

    moments = refinement.observe_targets(0, branch).moments.unpack()

    run = dense.branch(0, branch)
    project = torch.inference_mode()(run.projected(None))
    own, whole = (project(run.run(run.normalise(hidden))) for hidden in (before, drifted))
    target = whole + MIX * (before + own - drifted - whole)
    torch.testing.assert_close(
        moments.mean_P[-target.shape[-1] :], target.flatten(0, 1).double().mean(0), rtol=1e-4, atol=1e-5
    )
