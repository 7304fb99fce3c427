"""Training branch by branch writes the same bytes on any number of shards, whatever happens on the way."""

import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from actors.errors import WorkerLostError
from actors.group import ShardGroup
from actors.local import LocalWorkers
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import attempts
from orchestrator.pruning.targets import Draft
from orchestrator.tuning.blocks import tune_blocks
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import family_named, layer_shape
from slimllm_ops.stream.read_back import read_back, require_outside_unchanged
from slimllm_ops.training.branches import BranchTraining
from tests.conftest import content
from tests.orchestrator.pruning.test_resume import Disturbed, interrupt
from tests.slimllm_ops.naive import random_channels, random_decision
from tests.tiny import save_tiny

SETTINGS = BranchTraining(epochs=4, learning_rate=2e-2)
DROPPED = 1


def plans_of(source: Checkpoint) -> list[LayerPlan]:
    """Plans of four layers: the first loses heads and channels, the second goes, the third loses nothing."""
    shape, hidden = layer_shape(source.config, 0), source.config.hidden_size
    heads = random_decision(0, [shape.num_attention_units - 1], shape.num_attention_units, hidden)
    return [
        LayerPlan(heads, random_channels(1, range(19), shape)),
        LayerPlan(dropped=True),
        LayerPlan(),
        LayerPlan(None, random_channels(2, range(33), shape)),
    ]


def write_pruned(source: Checkpoint, directory: Path) -> Checkpoint:
    """Write the model that the plans make of a source."""
    writer, plans = CheckpointWriter(source, directory), plans_of(source)
    kept = [layer for layer, plan in enumerate(plans) if not plan.dropped]
    for number, layer in enumerate(kept):
        writer.write_layer(layer, plans[layer], number)
    writer.finish(plans)
    return Checkpoint.open(directory)


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(make_llama(num_key_value_heads=2, num_hidden_layers=4, dtype=torch.float16))


@pytest.fixture(scope="module")
def pruned(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_pruned(source, tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="module")
def blocks_BT(token_blocks: np.ndarray) -> np.ndarray:
    return token_blocks[:7]


def tuned(
    folder: Path,
    source: Checkpoint,
    pruned: Checkpoint,
    blocks_BT: np.ndarray,
    num_shards: int = 1,
    reporter: Reporter | None = None,
) -> Draft:
    """Tune a pruned model into a folder, or continue there."""
    reporter = reporter or Disturbed([])
    draft = Draft.open(source, folder / "model", folder / "log")
    with ShardGroup(LocalWorkers(num_shards, 1), num_shards) as shards:
        again = partial(attempts, shards, reporter)
        tune_blocks(shards, source, pruned, plans_of(source), blocks_BT, draft, reporter, again, SETTINGS)
    draft.finish()
    return draft


@pytest.fixture(scope="module")
def undisturbed(
    source: Checkpoint, pruned: Checkpoint, blocks_BT: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Draft:
    return tuned(tmp_path_factory.mktemp("undisturbed"), source, pruned, blocks_BT)


def states_of(directory: Path, blocks_BT: np.ndarray) -> torch.Tensor:
    """The states that a model hands to its head, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model.model(torch.from_numpy(blocks_BT.astype(np.int64))).last_hidden_state


def test_the_tuned_model_is_nearer_to_the_dense_one_and_computes_what_the_run_computed(
    source: Checkpoint, pruned: Checkpoint, undisturbed: Draft, blocks_BT: np.ndarray
) -> None:
    written = Checkpoint.open(undisturbed.writer.directory)
    assert written.num_layers == 3
    assert written.config.to_dict() == pruned.config.to_dict()
    assert [plan.dropped for plan in undisturbed.log.plans] == [layer == DROPPED for layer in range(4)]
    assert [written.layer_shapes(layer) for layer in range(3)] == [pruned.layer_shapes(layer) for layer in range(3)]
    dense, before, after = (states_of(one.directory, blocks_BT) for one in (source, pruned, written))
    assert float((after - dense).norm()) < 0.8 * float((before - dense).norm())
    probe = undisturbed.log.probe()
    assert read_back(written, probe.ids_T, probe.states_TD, torch.float32) < 1e-4
    require_outside_unchanged(source, written)


@pytest.mark.parametrize("num_shards", [2, 3])
def test_any_number_of_shards_writes_the_same_bytes(
    source: Checkpoint,
    pruned: Checkpoint,
    undisturbed: Draft,
    blocks_BT: np.ndarray,
    tmp_path: Path,
    num_shards: int,
) -> None:
    draft = tuned(tmp_path, source, pruned, blocks_BT, num_shards)
    assert content(draft.writer.directory) == content(undisturbed.writer.directory)


def lose_a_worker() -> None:
    raise WorkerLostError("a worker died.")


def test_whatever_happens_the_same_bytes_are_written(
    source: Checkpoint, pruned: Checkpoint, undisturbed: Draft, blocks_BT: np.ndarray, tmp_path: Path
) -> None:
    first = Disturbed([("tuning", 1, lose_a_worker), ("tuning", 2, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, source, pruned, blocks_BT, 2, first)
    assert first.told.getvalue().count("a worker died. The run continues from earlier results") == 1
    second = Disturbed([("replaying", 1, lose_a_worker), ("tuning", 3, lose_a_worker)])
    draft = tuned(tmp_path, source, pruned, blocks_BT, 2, second)
    assert not first.to_come + second.to_come
    assert content(draft.writer.directory) == content(undisturbed.writer.directory)
    probe, expected = draft.log.probe(), undisturbed.log.probe()
    assert [state.tobytes() for state in probe.states_TD] == [state.tobytes() for state in expected.states_TD]
    # There is nothing left to do.
    assert content(tuned(tmp_path, source, pruned, blocks_BT).writer.directory) == content(draft.writer.directory)


@pytest.mark.parametrize("model_type", ["gemma2", "granite"])
def test_the_loss_of_every_branch_is_told_and_falls(model_type: str, blocks_BT: np.ndarray, tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 4}
    source = Checkpoint.open(save_tiny(family_named(model_type), tmp_path / "dense", **settings))
    pruned = write_pruned(source, tmp_path / "pruned")
    printed = io.StringIO()
    tuned(tmp_path, source, pruned, blocks_BT, reporter=Reporter(Console(file=printed, width=200), verbose=True))
    told = re.findall(r"layer (\d), (\w+): loss (\S+) before, (\S+) after", printed.getvalue())
    assert [(layer, name) for layer, name, *_ in told] == [(str(n), m) for n in range(3) for m in ("self_attn", "mlp")]
    assert all(float(after) < float(before) for *_, before, after in told)


def test_mixtures_of_experts_are_refused(tmp_path: Path, blocks_BT: np.ndarray) -> None:
    source = Checkpoint.open(save_tiny(family_named("mixtral"), tmp_path / "dense", num_hidden_layers=4))
    with pytest.raises(InputError, match=r"^Mixtral models cannot be trained branch by branch"):
        tuned(tmp_path, source, source, blocks_BT)
