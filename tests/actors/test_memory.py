"""A worker's memory does not grow with a model's depth, and only hidden states grow with the number of tokens."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.random_model import Shape, write_model
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import family_named
from slimllm_ops.stream.footprint import Footprint
from tests.actors.one_pass import AT_ONCE
from tests.forks import Forks
from tests.tiny import save_tiny

Peaks = Callable[..., int]
ROOT = Path(__file__).parents[2]
SHALLOW, DEEP = 3, 12
BLOCK = 256
FEW, MANY = 4, 36
WAYS = ["deciding", pytest.param("dense", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A process that has imported what a pass needs, and has computed nothing yet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    forks = Forks("import tests.actors.one_pass\n", environment, tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def peaks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Peaks:
    """Measures the peak of a pass in a process of its own, each once."""
    folder = tmp_path_factory.mktemp("memory")

    @cache
    def measure(way: str, layers: int, blocks: int, *options: str) -> int:
        model = folder / f"{layers}"
        if not model.exists():
            write_model(model, shape_of(layers))
        return measured(forks, model, way, blocks, *options)

    return measure


def measured(forks: Forks, model: Path, way: str, blocks: int, *options: str) -> int:
    """Return the peak of a pass in a process of its own, in bytes."""
    words = (str(model), way, str(blocks), str(BLOCK), *options)
    ended = forks.run(f"from tests.actors.one_pass import main; main(*{words!r})", seconds=300)
    assert ended.code == 0, ended.stderr
    return json.loads(ended.stdout)["peak"]


def shape_of(layers: int) -> Shape:
    return Shape(hidden=512, intermediate=704, layers=layers, heads=8, kv_heads=4, vocabulary=500)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_model(tmp_path_factory.mktemp("one") / "model", shape_of(2)))


def footprint_of(checkpoint: Checkpoint, way: str) -> Footprint:
    """Return what a pass of a shard is told to need."""
    read = Footprint.of_layerwise if way == "deciding" else Footprint.of
    return read(checkpoint, torch.device("cpu"))


@pytest.mark.parametrize("way", [*WAYS, "sensitivity", "training"])
def test_four_times_the_layers_take_no_more_memory(peaks: Peaks, way: str) -> None:
    # Of what the further layers would take, were they held, the tenth part is more than the allocator's moods.
    further = (DEEP - SHALLOW) * 4 * shape_of(DEEP).layer_parameters
    assert peaks(way, DEEP, FEW) - peaks(way, SHALLOW, FEW) < 0.1 * further


@pytest.mark.parametrize("way", WAYS)
def test_of_more_tokens_only_the_states_are_held(peaks: Peaks, checkpoint: Checkpoint, way: str) -> None:
    footprint = footprint_of(checkpoint, way)
    grown = peaks(way, SHALLOW, MANY) - peaks(way, SHALLOW, FEW)
    states = footprint.states_per_token * (MANY - FEW) * BLOCK
    assert 0.8 * states < grown < 1.25 * states


def test_states_that_are_offloaded_are_not_held(peaks: Peaks, checkpoint: Checkpoint) -> None:
    footprint = footprint_of(checkpoint, "deciding")
    states = footprint.states_per_token * (MANY - FEW) * BLOCK
    assert peaks("deciding", SHALLOW, MANY, "offload") - peaks("deciding", SHALLOW, FEW) < 0.1 * states


@pytest.mark.parametrize("way", WAYS)
def test_the_footprint_bounds_the_peak(peaks: Peaks, checkpoint: Checkpoint, way: str) -> None:
    """The footprint is what micro-batches are sized by: what it allows must hold the peak, and not by far."""
    footprint = footprint_of(checkpoint, way)
    tokens = MANY * BLOCK
    allowed = footprint.fixed + footprint.states_per_token * tokens + footprint.activations_per_token * AT_ONCE
    assert 0.6 * allowed < peaks(way, SHALLOW, MANY) < 1.15 * allowed


@pytest.mark.slow
def test_the_footprint_of_training_bounds_the_peak(peaks: Peaks, checkpoint: Checkpoint) -> None:
    footprint = Footprint.of_branch_training(checkpoint, checkpoint, torch.device("cpu"))
    tokens = MANY * BLOCK
    allowed = footprint.fixed + footprint.states_per_token * tokens + footprint.activations_per_token * AT_ONCE
    assert 0.5 * allowed < peaks("training", SHALLOW, MANY) < allowed


def test_the_footprint_of_a_mixture_of_experts_bounds_the_peak(forks: Forks, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "vocab_size": 500}
    more = {"num_hidden_layers": 2, "num_local_experts": 8, "max_position_embeddings": BLOCK, "sliding_window": None}
    model = save_tiny(family_named("mixtral"), tmp_path / "model", **sizes, **more)
    footprint = footprint_of(Checkpoint.open(model), "deciding")
    held = footprint.fixed + footprint.states_per_token * MANY * BLOCK
    assert (
        0.6 * held
        < measured(forks, model, "deciding", MANY)
        < 1.15 * (held + footprint.activations_per_token * AT_ONCE)
    )
