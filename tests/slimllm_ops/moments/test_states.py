"""States in a file are read as they were written, one at a time in memory, and no file is left behind."""

from pathlib import Path

import pytest
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import layer_shape
from slimllm_ops.moments.states import SpilledStates
from slimllm_ops.stream.passes import LayerStream
from tests.slimllm_ops.naive import observations, random_channels

CPU = torch.device("cpu")


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 7), (2, 5, 7), (1, 1, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    states = SpilledStates(tmp_path, CPU)
    for tensor in tensors(dtype):
        states.append(tensor)
    assert len(states) == 3
    assert all(torch.equal(one, other) for one, other in zip(states, tensors(dtype), strict=True))
    states[1] = states[1] * 2
    expected = [tensors(dtype)[0], tensors(dtype)[1] * 2, tensors(dtype)[2]]
    assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    states = SpilledStates(tmp_path, CPU)
    whole = torch.arange(24.0).view(2, 3, 4)
    states.append(whole.transpose(0, 2))
    assert torch.equal(states[0], whole.transpose(0, 2))


def test_the_file_has_no_name(tmp_path: Path) -> None:
    states = SpilledStates(tmp_path, CPU)
    states.append(torch.ones(100))
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    states = SpilledStates(tmp_path, CPU)
    states.append(torch.ones(100))
    states._file.truncate(40)
    with pytest.raises(OSError, match="batch 0 end after 40 of 400 bytes"):
        states[0]


def test_a_stream_that_spills_computes_what_one_in_memory_does(
    model_dir: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(model_dir)
    batches = [ids[:3], ids[3:5]]
    spilling = LayerStream(checkpoint, batches, CPU, lambda: SpilledStates(tmp_path, CPU))
    held = LayerStream(checkpoint, batches, CPU)
    decision = random_channels(0, range(1, 48, 2), layer_shape(checkpoint.config, 0))
    for layer in range(checkpoint.num_layers):
        for branch, choice in ((checkpoint.family.attention, None), (checkpoint.family.mlp, decision)):
            observed = (stream.observe(layer, branch) for stream in (spilling, held))
            for one, other in zip(*map(observations, observed), strict=True):
                assert torch.equal(one.moments.unpack().covariance_PP, other.moments.unpack().covariance_PP)
            assert spilling.apply(layer, branch, choice) == held.apply(layer, branch, choice)
    assert all(torch.equal(one, other) for one, other in zip(spilling.hidden, held.hidden, strict=True))
    assert spilling.negative_log_likelihood() == held.negative_log_likelihood()
