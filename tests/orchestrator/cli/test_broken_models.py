"""A broken model or tokenizer is reported in one line, before Ray starts if possible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.cli.broken_inputs import (
    BROKEN_MODELS,
    BROKEN_TOKENIZERS,
    DAMAGED_MODELS,
    Cli,
    removed,
    text,
    truncated,
)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("broken", BROKEN_MODELS)
def test_a_broken_model_is_known_before_ray_starts(cli: Cli, model: Path, token_file: Path, broken: str) -> None:
    spoil, said = BROKEN_MODELS[broken]
    spoil(model)
    cli.fails(said, model, "--calibration", token_file)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("shard", "said"), [("gone", "is missing"), ("truncated", "truncated or broken")])
def test_a_shard_that_is_missing_or_truncated(
    cli: Cli, make_llama: Callable[..., Path], token_file: Path, shard: str, said: str
) -> None:
    model = make_llama(max_shard_size="20KB")
    second = sorted(model.glob("*.safetensors"))[1]
    (removed if shard == "gone" else lambda name: truncated(name, 10))(second.name)(model)
    cli.fails(f"shard {second.name} of .* {said}.*: download it again", model, "--calibration", token_file)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("broken", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_known_before_ray_starts(cli: Cli, model: Path, tmp_path: Path, broken: str) -> None:
    spoil, said = BROKEN_TOKENIZERS[broken]
    spoil(model)
    (model / "evil.py").write_text("raise SystemExit('was run')\n")
    text("one two three " * 100)(tmp_path / "x.txt")
    cli.fails(said, model, "--calibration", tmp_path / "x.txt")


@pytest.mark.parametrize("damage", DAMAGED_MODELS)
def test_a_damaged_model_is_found_by_the_workers(
    cli: Cli, model: Path, token_file: Path, last_run: Callable[[], Any], damage: str
) -> None:
    spoil, said = DAMAGED_MODELS[damage]
    spoil(model)
    data = ["--calibration", token_file, *(["--evaluate", token_file] if damage == "logits overflow" else [])]
    cli.fails(said, model, *data, "--local", "--run-name", damage, with_progress=True)
    assert (last_run().info.run_name, last_run().info.status) == (damage, "FAILED")


@pytest.mark.usefixtures("local_ray")
def test_what_a_worker_on_ray_finds_is_the_same_line(
    cli: Cli, model: Path, token_file: Path, last_run: Callable[[], Any]
) -> None:
    spoil, said = DAMAGED_MODELS["nan in a layer"]
    spoil(model)
    cli.fails(said, model, "--calibration", token_file, "--workers", 1, "--run-name", "on Ray", with_progress=True)
    assert (last_run().info.run_name, last_run().info.status) == ("on Ray", "FAILED")
