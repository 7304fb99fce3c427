"""The inputs of a run: how a model is named and found, and how data are loaded for it."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import PruneConfig
from orchestrator.inputs import load_inputs, model_name, resolve_model
from slimllm_ops.errors import CheckpointError, InputError
from slimllm_ops.models.families import family_named
from tests.tiny import save_tiny


def test_a_model_is_called_by_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_name(None) == "builtin"
    assert model_name("org/some-model") == "some-model"
    assert model_name(f"{tmp_path}/") == tmp_path.name
    monkeypatch.chdir(tmp_path)
    assert model_name(".") == tmp_path.name


def test_a_directory_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == tmp_path / "org" / "model"


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
    with pytest.raises(InputError, match=r"sparsity 0.9 is not reachable.*one channel left.*ask for less"):
        load_inputs(config, print)


def test_a_mixture_of_experts_is_not_refined(token_file: Path, tmp_path: Path) -> None:
    model = save_tiny(family_named("mixtral"), tmp_path / "model")
    config = PruneConfig(model=str(model), calibration=str(token_file), sparsity=0.3, method="gram")
    assert load_inputs(config, print).source.family.name == "Mixtral"
    with pytest.raises(InputError, match=r"Mixtral models cannot be refined, .*: leave refinement out"):
        load_inputs(replace(config, refine=True), print)
