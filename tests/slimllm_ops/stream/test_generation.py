"""A model samples the tokens that it samples without a cache, from the same random numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import FAMILIES, Family
from slimllm_ops.stream.generation import GenerationStream, numbered
from slimllm_ops.stream.sampling import sample
from slimllm_ops.stream.weights import ModelWeights
from tests.tiny import save_tiny

LENGTH, SEED = 14, 5


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    """Rows of five sequences: their numbers, then four tokens of each."""
    ids = np.random.default_rng(0).integers(3, 97, size=(5, 4))
    return numbered(np.array([0, 1, 2, 3, 7]), ids)


def generated(
    directory: Path, rows: np.ndarray, *, at_once: int = 3, seed: int = SEED, keep_layers: bool = True
) -> np.ndarray:
    """Return all rows that a stream samples, and check that nothing is left to sample."""
    ids = torch.from_numpy(rows.astype(np.int64))
    batches = list(ids.split(at_once))
    stream = GenerationStream(Checkpoint.open(directory), batches, torch.device("cpu"), LENGTH, seed, keep_layers)
    found = [stream.generate_next() for _ in batches]
    assert stream.generate_next().shape == (0, 1 + LENGTH)
    stream.close()
    assert {one.dtype for one in found} == {np.dtype(np.int32)}
    return np.concatenate(found)


@torch.inference_mode()
def without_cache(model: PreTrainedModel, rows: np.ndarray) -> np.ndarray:
    """Return the same, from transformers' own model, which passes the whole sequences for every token."""
    uniform_bT, ids = torch.stack([uniform(number) for number in rows[:, 0].tolist()]), torch.from_numpy(rows[:, 1:])
    for place in range(ids.shape[1], LENGTH):
        logits_bV = model(ids, use_cache=False).logits[:, -1].float()
        ids = torch.cat([ids, sample(logits_bV, uniform_bT[:, place])[:, None]], dim=1)
    return numbered(rows[:, 0], ids.numpy())


def uniform(number: int) -> torch.Tensor:
    """Return the random numbers of a sequence."""
    (mixed,) = np.random.SeedSequence([SEED, number]).generate_state(1, np.uint64)
    return torch.rand(LENGTH, generator=torch.Generator().manual_seed(int(mixed) >> 1))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_every_family_samples_what_its_own_model_samples(family: Family, prompts: np.ndarray, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    expected = without_cache(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), prompts)
    assert np.array_equal(generated(tmp_path, prompts), expected)
    assert np.array_equal(generated(tmp_path, prompts, keep_layers=False), expected)


def test_a_sequence_depends_on_its_number_and_the_seed(gqa_model: Path, prompts: np.ndarray) -> None:
    found = generated(gqa_model, prompts)
    assert np.array_equal(generated(gqa_model, prompts[::-1], at_once=2)[::-1], found)
    renumbered = prompts.copy()
    renumbered[:, 0] += 10
    for other in (generated(gqa_model, renumbered), generated(gqa_model, prompts, seed=SEED + 1)):
        assert (other[:, 5:] != found[:, 5:]).any(axis=1).all()


def test_one_layer_at_a_time_is_in_memory_if_none_is_kept(
    gqa_model: Path, prompts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], ModelWeights.load

    def counted(weights: ModelWeights, layer: int) -> torch.nn.Module:
        module = load(weights, layer)
        filled = [not any(one.is_meta for one in other.parameters()) for other in weights.layers]
        loaded.append((layer, filled.count(True)))
        return module

    monkeypatch.setattr(ModelWeights, "load", counted)
    generated(gqa_model, prompts, at_once=5, keep_layers=False)
    layers = Checkpoint.open(gqa_model).num_layers
    assert loaded == [(layer, 1) for layer in range(layers)] * (LENGTH - 4)


def test_logits_that_overflow_are_told(gqa_model: Path, prompts: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = GenerationStream(
        Checkpoint.open(gqa_model), [torch.from_numpy(prompts.astype(np.int64))], torch.device("cpu"), LENGTH, 0, True
    )
    with torch.no_grad():
        stream._model.get_output_embeddings().weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"^the logits hold NaN or infinity in torch.float32 while the model"):
        stream.generate_next()
