"""What cannot be measured is refused before any model runs."""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.config import ConfigError
from orchestrator.speed import engines
from orchestrator.speed.config import BenchConfig
from orchestrator.speed.inputs import BenchModel, load_bench_models
from slimllm_ops.errors import CheckpointError


def load(*models: Path, **settings: object) -> tuple[BenchModel, ...]:
    config = BenchConfig(models=tuple(map(str, models)), **{"prompt_length": (8,), "new_tokens": 4} | settings)  # type: ignore[arg-type]
    return load_bench_models(config, print)


def test_a_model_has_its_size_and_work(gqa_model: Path) -> None:
    (model,) = load(gqa_model)
    assert model.num_bytes == (gqa_model / "model.safetensors").stat().st_size
    assert model.parameters == 29_472
    assert model.macs is not None


def test_models_of_the_same_name_are_told_apart(gqa_model: Path, tmp_path: Path) -> None:
    places = [tmp_path / folder / "model" for folder in ("one", "two")]
    for place in places:
        shutil.copytree(gqa_model, place)
    assert [model.name for model in load(*places)] == ["one/model", "two/model"]


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none does not exist: pass a directory or a hub id"):
        load(tmp_path / "none")


def test_a_model_without_weights_is_refused(gqa_model: Path, tmp_path: Path) -> None:
    shutil.copy(gqa_model / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(tmp_path)


def test_a_model_that_is_no_causal_model_is_refused(gqa_model: Path, tmp_path: Path) -> None:
    shutil.copy(gqa_model / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="does not know as a causal language model"):
        load(tmp_path)


def test_a_prompt_that_is_too_long_is_refused(gqa_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt_length 61 and new_tokens 4 make 65 tokens, and .* takes 64 at most"):
        load(gqa_model, prompt_length=(8, 61))


def test_a_model_by_two_names_is_refused(gqa_model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(gqa_model)
    with pytest.raises(ConfigError, match=r"are the same model, .*: give each once"):
        load(gqa_model, tmp_path / "link")


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("vllm", "engine vllm needs the package vllm, which is not installed: run `pip install vllm`, or pass"),
        ("llama.cpp", "needs the package llama_cpp, which is not installed: run `pip install llama-cpp-python`, or"),
    ],
)
def test_an_engine_that_is_not_installed_is_refused(
    gqa_model: Path, engine: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        load(gqa_model, engine=engine, batch_size=(1,))


def test_llama_cpp_takes_gguf_files_only(gqa_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (model,) = load(tmp_path / "model.gguf", engine="llama.cpp", batch_size=(1,))
    assert (model.name, model.num_bytes, model.macs) == ("model", 4, None)
    for other in (gqa_model, gqa_model / "config.json", tmp_path / "none.gguf"):
        with pytest.raises(ConfigError, match=r"runs a \.gguf file, and .* is none"):
            load(other, engine="llama.cpp", batch_size=(1,))


def test_widths_of_an_unknown_family_are_refused(gqa_model: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    assert load(gqa_model, tmp_path)[1].macs is not None
    with pytest.raises(CheckpointError, match="gpt2"):
        load(gqa_model, tmp_path, widths=True)
