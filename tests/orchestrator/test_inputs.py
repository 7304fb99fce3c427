"""The inputs of a run: how a model is named and found, and how data are loaded for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from orchestrator import PruneConfig
from orchestrator.builtin import MODEL_DIR, heldout_text
from orchestrator.data import DataError, text
from orchestrator.inputs import load_inputs, model_name, model_names, warnings_of
from orchestrator.sources.models import resolve_model
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError, InputError
from slimllm_ops.models.families import family_named
from tests.tiny import save_tiny


def test_a_model_is_called_by_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_name(None) == "builtin"
    assert model_name("org/some-model") == "some-model"
    assert model_name(f"{tmp_path}/") == tmp_path.name
    (tmp_path / "base").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "base")
    assert model_name(str(tmp_path / "mine")) == "mine"
    monkeypatch.chdir(tmp_path / "base")
    assert (model_name("."), model_name("..")) == ("base", tmp_path.name)


def test_a_directory_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model").directory == tmp_path / "org" / "model"


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/model"])
def test_a_path_that_cannot_be_looked_at(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not a readable path .*: check it"):
        resolve_model(path)


def test_all_the_data_are_loaded_for_the_model(gqa_model: Path, token_file: Path) -> None:
    spec = str(token_file)
    loaded = load_inputs(PruneConfig(model=str(gqa_model), calibration=spec, evaluate=(spec,)), print)
    assert loaded.name == gqa_model.name
    assert (loaded.calibration.num_blocks, loaded.calibration.block_length) == (24, 16)
    assert [blocks.digest for blocks in loaded.held_out] == [loaded.calibration.digest]


def test_a_sparsity_out_of_reach_is_known_before_anything_starts(gqa_model: Path, token_file: Path) -> None:
    config = PruneConfig(model=str(gqa_model), calibration=str(token_file), sparsity=0.9)
    with pytest.raises(InputError, match=r"sparsity 0.9 is not reachable.*channels that may stay.*ask for less"):
        load_inputs(config, print)


def test_a_mixture_of_experts_is_not_refined(token_file: Path, tmp_path: Path) -> None:
    model = save_tiny(family_named("mixtral"), tmp_path / "model")
    config = PruneConfig(model=str(model), calibration=str(token_file), sparsity=0.3, method="gram")
    assert load_inputs(config, print).source.family.name == "Mixtral"
    with pytest.raises(InputError, match=r"Mixtral models cannot be refined, .*: leave refinement out"):
        load_inputs(replace(config, refine=True), print)


@pytest.fixture(scope="module")
def builtin_blocks() -> int:
    """The whole blocks of the built-in held-out text, as its tokenizer cuts it."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokens = sum(len(ids) for ids in tokenizer(list(heldout_text()))["input_ids"])
    return tokens // Checkpoint.open(MODEL_DIR).config.max_position_embeddings


def test_held_out_text_is_taken_whole_whatever_calibration_takes(builtin_blocks: int) -> None:
    (whole,) = load_inputs(PruneConfig(samples=2), print).held_out
    assert whole.input_ids_BT.shape == (builtin_blocks, 256)
    assert builtin_blocks > 128
    (again,) = load_inputs(PruneConfig(samples=3, seed=5), print).held_out
    assert again.digest == whole.digest


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (255, 1), (256, 1), (1000, 3), (10**9, None)])
def test_evaluate_tokens_takes_the_first_blocks(builtin_blocks: int, tokens: int, blocks: int | None) -> None:
    (whole,) = load_inputs(PruneConfig(samples=2), print).held_out
    (some,) = load_inputs(PruneConfig(samples=2, evaluate_tokens=tokens), print).held_out
    assert len(some.input_ids_BT) == (blocks or builtin_blocks)
    np.testing.assert_array_equal(some.input_ids_BT, whole.input_ids_BT[: len(some.input_ids_BT)])


def test_evaluate_tokens_applies_to_token_files(gqa_model: Path, token_file: Path, token_blocks: np.ndarray) -> None:
    asked = PruneConfig(
        model=str(gqa_model), calibration=str(token_file), evaluate=(str(token_file),), evaluate_tokens=50
    )
    loaded = load_inputs(asked, print)
    assert loaded.calibration.num_blocks == len(token_blocks)
    np.testing.assert_array_equal(loaded.held_out[0].input_ids_BT, token_blocks[:3])


def test_a_text_that_would_take_very_long_needs_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MOST_EVALUATED", 10_000)
    with pytest.raises(DataError, match=r"more than 10,000 tokens to evaluate on.*--evaluate-tokens"):
        load_inputs(PruneConfig(samples=2), print)
    assert len(load_inputs(PruneConfig(samples=2, evaluate_tokens=20_000), print).held_out[0].input_ids_BT) == 78


def test_a_model_on_the_built_in_text_is_warned_of(gqa_model: Path) -> None:
    model, data = str(gqa_model), "tokens.parquet"
    (said,) = warnings_of(PruneConfig(model=model))
    assert said.startswith(
        f"{gqa_model.name} is calibrated on the built-in text, Python's documentation, and its perplexity"
    )
    assert "--calibration SPEC" in said
    (said,) = warnings_of(PruneConfig(model=model, evaluate=(data,)))
    assert "perplexity" not in said
    for silent in ({}, {"model": model, "calibration": data}, {"model": model, "method": "gram", "moments": data}):
        assert warnings_of(PruneConfig(**silent)) == []


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    models = [tmp_path / "one" / "model", tmp_path / "two" / "model", tmp_path / "other", "s3://bucket/three/model"]
    assert model_names([*map(str, models)]) == ["one/model", "two/model", "other", "three/model"]
    assert model_names(["a/model", "b/../a/model"]) == ["a/model#1", "a/model#2"]
