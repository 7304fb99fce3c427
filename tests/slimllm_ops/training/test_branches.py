"""A branch is trained as autograd and Adam train it in the whole model, and the same by any number of shards."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tensor_index import Place
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.errors import InputError, NonFiniteError
from slimllm_ops.models.families import FAMILIES, Branch, Family, family_named
from slimllm_ops.moments.states import SpilledStates, StateStore
from slimllm_ops.stream.opening import Workplace, open_pair
from slimllm_ops.stream.padding import PADDING
from slimllm_ops.training.branches import (
    SMALLEST_POWER,
    BranchState,
    BranchTraining,
    BranchTrainingStream,
    require_trainable,
)
from tests.slimllm_ops.pruned import write_uneven

CPU = torch.device("cpu")
SETTINGS = BranchTraining(epochs=1, learning_rate=1e-2)
# The layer that is trained; the layer before it leaves the two streams apart.
LAYER = 1


@pytest.fixture(scope="module")
def blocks(ids: torch.Tensor) -> torch.Tensor:
    return ids[:6]


@pytest.fixture(scope="module")
def make_pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Prune a random model of a family; the dense one is beside it."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = write_uneven(family_named(model_type), tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return make


@pytest.fixture(scope="module")
def model(make_pruned: Callable[[str], Path]) -> Path:
    return make_pruned("llama")


def opened(pruned: Path, batches: list[torch.Tensor], store: StateStore = list) -> BranchTrainingStream:
    """Both streams, before the layer that is trained."""
    dense, checkpoint = (Checkpoint.open(folder) for folder in (pruned.parent / "dense", pruned))
    stream = open_pair(Workplace(CPU, store, store), batches, dense, checkpoint, (0, 1, 2), BranchTrainingStream)
    for layer in range(LAYER):
        stream.forward_whole(layer)
    return stream


def pass_unchanged(stream: BranchTrainingStream, branch: Branch) -> float:
    """Run a branch in both streams with the weights that it has; return the mean loss before and after."""
    before = stream.prepare(LAYER, branch)
    state = stream._begin(LAYER, branch)
    after = stream.apply(stream.rounded(state, LAYER, branch), LAYER, branch)
    assert after.count == before.count
    assert after.total == pytest.approx(before.total, rel=1e-3)
    return before.value


class Whole:
    """The dense and the pruned model, each whole, up to the layer that is trained.

    The states after the attention are those after a layer whose MLP adds nothing.
    """

    def __init__(self, pruned: Path, branch: Branch) -> None:
        load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        self.models: list[PreTrainedModel] = [load(folder).eval() for folder in (pruned.parent / "dense", pruned)]
        family = Checkpoint.open(pruned).family
        self.layers = [model.get_submodule(family.layers)[LAYER] for model in self.models]
        for layer in self.layers if branch == family.attention else []:
            for parameter in layer.get_submodule(family.mlp.output).parameters():
                parameter.data.zero_()
        self.trained = {
            f"{name}.{kind}": parameter
            for name in (*branch.inputs, branch.output)
            for kind, parameter in self.layers[1].get_submodule(name).named_parameters()
        }

    def loss(self, ids_T: torch.Tensor) -> torch.Tensor:
        """The mean loss over a block's tokens."""
        states: list[torch.Tensor] = []
        hooks = [layer.register_forward_hook(lambda *call: states.append(call[-1])) for layer in self.layers]
        for model in self.models:
            model(ids_T[None])
        for hook in hooks:
            hook.remove()
        dense, tuned = states
        error = (tuned - dense.detach()).square().mean(dim=-1)
        return (error / (dense.detach().square().mean(dim=-1) + SMALLEST_POWER)).mean()


# Biases, norms of the outputs, a multiplier, parallel branches, no module for the MLP, stacked maps, unnormed inputs.
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("model_type", ["starcoder2", "gemma2", "granite", "cohere2", "opt", "phi3", "exaone4"])
def test_the_gradient_is_what_autograd_gives_for_the_whole_models(
    make_pruned: Callable[[str], Path], blocks: torch.Tensor, model_type: str, part: str
) -> None:
    pruned = make_pruned(model_type)
    stream = opened(pruned, [blocks[:1]])
    attention, mlp = stream.pruned.family.branches
    branch = attention if part == "attention" else mlp
    if branch == mlp:
        pass_unchanged(stream, attention)
    whole = Whole(pruned, branch)
    loss = whole.loss(blocks[0])
    loss.backward()

    assert stream.prepare(LAYER, branch).value == pytest.approx(loss.item(), rel=1e-4)
    state = stream.train(None, LAYER, branch, SETTINGS, num_steps=1)

    assert state.weights.keys() == whole.trained.keys()
    # The gradient of a bias that softmax ignores is nothing but rounding.
    largest = max(float(parameter.grad.abs().max()) for parameter in whole.trained.values())
    for name, parameter in whole.trained.items():
        # Adam's mean of a single gradient is a tenth of it.
        np.testing.assert_allclose(10 * state.means[name], parameter.grad.numpy(), rtol=1e-3, atol=1e-5 * largest)


def test_the_steps_are_those_of_adam_on_one_block_after_the_other(model: Path, blocks: torch.Tensor) -> None:
    settings, epochs = BranchTraining(epochs=2, learning_rate=1e-2), 2
    stream = opened(model, [blocks[:4], blocks[4:]])
    branch, num_steps = stream.pruned.family.attention, epochs * len(blocks)
    stream.prepare(LAYER, branch)
    state: BranchState | None = None
    for _ in range(epochs):
        state = stream.train(state, LAYER, branch, settings, num_steps=num_steps)

    whole = Whole(model, branch)
    optimiser = torch.optim.Adam(whole.trained.values())
    for step in range(num_steps):
        optimiser.param_groups[0]["lr"] = settings.rate(step, num_steps)
        optimiser.zero_grad()
        whole.loss(blocks[step % len(blocks)]).backward()
        optimiser.step()
    assert state is not None
    assert state.steps == num_steps
    for name, parameter in whole.trained.items():
        np.testing.assert_allclose(state.weights[name], parameter.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_then_falls_to_nothing() -> None:
    rates = [SETTINGS.rate(step, 50) for step in range(50)]
    assert rates.index(max(rates)) == 5
    assert max(rates) == SETTINGS.learning_rate
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[0] < 0.2 * SETTINGS.learning_rate
    assert 0 < rates[-1] < 0.01 * SETTINGS.learning_rate
    # Few steps have rates too.
    assert [SETTINGS.rate(step, 2) > 0 for step in range(2)] == [True, True]


def trained(stream: BranchTrainingStream, branch: Branch, epochs: int = 8) -> tuple[BranchState, float, float]:
    """Train a branch on a stream that has all blocks, and apply it; return it and the losses before and after."""
    before, state = stream.prepare(LAYER, branch), None
    num_steps = epochs * sum(map(len, stream.pruned.batches))
    for _ in range(epochs):
        state = stream.train(state, LAYER, branch, SETTINGS, num_steps=num_steps)
    assert state is not None
    after = stream.apply(stream.rounded(state, LAYER, branch), LAYER, branch)
    return state, before.value, after.value


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_the_loss_falls_and_the_stream_comes_nearer_to_the_dense_one(
    make_pruned: Callable[[str], Path], blocks: torch.Tensor, model_type: str
) -> None:
    pruned = make_pruned(model_type)
    stream, unchanged = opened(pruned, [blocks]), opened(pruned, [blocks])
    for branch in stream.pruned.family.branches:
        _, before, after = trained(stream, branch)
        assert after < 0.7 * before
    unchanged.forward_whole(LAYER)
    assert torch.equal(unchanged._dense.hidden[0], stream._dense.hidden[0])
    left, lost = (float((one._dense.hidden[0] - one.pruned.hidden[0]).norm()) for one in (stream, unchanged))
    assert left < 0.8 * lost


def test_only_linear_maps_are_trained(make_pruned: Callable[[str], Path], blocks: torch.Tensor) -> None:
    stream = opened(make_pruned("qwen3"), [blocks])
    branch, held = stream.pruned.family.attention, stream.pruned.weights(LAYER)
    before = {name: tensor.clone() for name, tensor in held.items()}
    state, *_ = trained(stream, branch)
    changed = {name for name, tensor in stream.pruned.weights(LAYER).items() if not torch.equal(tensor, before[name])}
    assert changed == state.weights.keys()
    assert changed == {f"self_attn.{name}_proj.weight" for name in "qkvo"}


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (2, 2, 2), (1, 4, 1)])
def test_any_number_of_shards_gives_the_same_bytes(model: Path, blocks: torch.Tensor, sizes: tuple[int, ...]) -> None:
    def tuned(shards: list[BranchTrainingStream]) -> tuple[BranchState, float]:
        branch, state = shards[0].pruned.family.mlp, None
        for shard in shards:
            pass_unchanged(shard, shard.pruned.family.attention)
            shard.prepare(LAYER, branch)
        for shard in 2 * shards:
            state = shard.train(state, LAYER, branch, SETTINGS, num_steps=12)
        assert state is not None
        return state

    # Every block is a batch, so that the states have the same bits.
    shares = [list(share.split(1)) for share in blocks.split(sizes)]
    one, several = tuned([opened(model, list(blocks.split(1)))]), tuned([opened(model, share) for share in shares])
    assert several.steps == one.steps == 12
    for kind in ("weights", "means", "squares"):
        for name, array in getattr(one, kind).items():
            assert getattr(several, kind)[name].tobytes() == array.tobytes()


def test_states_in_files_give_the_same_bytes(model: Path, blocks: torch.Tensor, tmp_path: Path) -> None:
    streams = [opened(model, [blocks[:4], blocks[4:]], store) for store in (list, lambda: SpilledStates(tmp_path, CPU))]
    one, other = (trained(stream, stream.pruned.family.mlp, epochs=1)[0] for stream in streams)
    for name, array in one.weights.items():
        assert other.weights[name].tobytes() == array.tobytes()


def test_padding_has_no_loss_and_is_not_counted(model: Path, blocks: torch.Tensor) -> None:
    padded, short = blocks[:2].clone(), blocks[:2, :5]
    padded[:, 5:] = PADDING
    found, expected = (
        trained(stream, stream.pruned.family.mlp, epochs=2)
        for stream in (opened(model, [padded]), opened(model, [short]))
    )
    assert found[1:] == pytest.approx(expected[1:], rel=1e-4)
    for name, array in expected[0].weights.items():
        np.testing.assert_allclose(found[0].weights[name], array, rtol=1e-3, atol=1e-4)


def test_a_token_with_massive_states_counts_no_more_than_others(model: Path, blocks: torch.Tensor) -> None:
    stream = opened(model, [blocks[:1]])
    branch = stream.pruned.family.mlp
    for both in (stream._dense, stream.pruned):
        both.hidden[0] = both.hidden[0].clone()
        both.hidden[0][0, 3] *= 1e4
    massive = stream.prepare(LAYER, branch).value
    assert massive < 2 * opened(model, [blocks[:1]]).prepare(LAYER, branch).value


def test_what_was_made_in_inference_mode_can_be_trained(
    make_pruned: Callable[[str], Path], blocks: torch.Tensor
) -> None:
    pruned, states = make_pruned("qwen3"), []
    for mode in (False, True):
        with torch.inference_mode(mode):
            stream = opened(pruned, [blocks])
            # The layer that is trained is not the one that was read ahead.
            for layer in (2, LAYER):
                stream.pruned.weights(layer)
        states.append(trained(stream, stream.pruned.family.attention, epochs=1)[0])
    for name, array in states[0].weights.items():
        assert states[1].weights[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_that_is_passed_again_from_its_file_gives_the_same_bits(
    make_llama: Callable[..., Path], blocks: torch.Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(make_llama(dtype=dtype, num_key_value_heads=2))
    first, again = (
        open_pair(Workplace(CPU, list, list), [blocks], checkpoint, checkpoint, (0, 1, 2), BranchTrainingStream)
        for _ in range(2)
    )
    tensors = checkpoint.read_layer(0)
    for stream in (first, again):
        stream.pruned.hidden[0] = stream.pruned.hidden[0] * 1.1
    for branch in checkpoint.family.branches:
        first.prepare(0, branch)
        state = first.train(None, 0, branch, SETTINGS, num_steps=len(blocks))
        rounded = first.rounded(state, 0, branch)
        first.apply(rounded, 0, branch)
        tensors |= {name: torch.from_numpy(array).to(dtype) for name, array in rounded.items()}
        for name, array in rounded.items():
            assert np.array_equal(tensors[name].float().numpy(), array), f"{name} is not rounded to {dtype}"
            assert not np.array_equal(array, state.weights[name])
    CheckpointWriter(checkpoint, tmp_path).write_tensors(0, tensors)
    (path,) = tmp_path.glob("*.safetensors")
    files = {name: Place(path.name, name) for name in load_file(path)}
    again.forward_written(0, replace(checkpoint, directory=tmp_path, files=files))
    assert torch.equal(again.pruned.hidden[0], first.pruned.hidden[0])
    assert torch.equal(again._dense.hidden[0], first._dense.hidden[0])


def test_what_diverges_and_what_overflows_is_told_with_its_layer(model: Path, blocks: torch.Tensor) -> None:
    stream = opened(model, [blocks])
    branch = stream.pruned.family.mlp
    stream.prepare(LAYER, branch)
    state = stream.train(None, LAYER, branch, BranchTraining(1, 1e30), num_steps=len(blocks))
    message = (
        r"^layer 1: the training of mlp diverged to values that torch.float32 cannot hold: lower the learning rate$"
    )
    with pytest.raises(NonFiniteError, match=message):
        stream.rounded(state, LAYER, branch)

    stream = opened(model, [blocks])
    stream.pruned.weights(LAYER)[f"{branch.reading.norm}.weight"].data.mul_(1e30)
    with pytest.raises(NonFiniteError, match=r"^layer 1: the activations of mlp hold NaN or infinity"):
        stream.prepare(LAYER, branch)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_families_with_experts_are_refused_in_one_line(family: Family) -> None:
    if not family.mlp.has_experts:
        require_trainable(family)
        return
    with pytest.raises(InputError, match=rf"^{family.name} models cannot be trained branch by branch, .* method$"):
        require_trainable(family)
