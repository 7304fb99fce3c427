"""`slimllm export --to gguf` in a terminal: where it writes the file, and what it refuses."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from orchestrator.cli import main
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.models.families import FAMILIES, family_named
from tests.conftest import content, files_of_at_most
from tests.orchestrator.exports.gguf_files import LINEAR, fields_of, prune, refused, untouched
from tests.tiny import save_tiny


def test_the_command_says_where_the_file_is(gguf: Any, pruned: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(pruned), "--to", "gguf"], catch_exceptions=False)
    path = pruned.with_name("model-0.2.gguf")
    assert (result.exit_code, result.stdout) == (0, f"gguf: {path}, of llama.cpp's architecture deci\n")
    assert fields_of(gguf, path)["general.architecture"] == "deci"
    assert {one.name for one in pruned.parent.iterdir()} == {"dense", "model-0.2", "model-0.2.gguf"}


def test_a_file_that_is_there_is_replaced_only_if_asked(gguf: Any, pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "there.gguf"
    path.write_text("mine")
    assert "exists: choose another --output, or pass --overwrite" in refused(pruned, "--output", path)
    assert path.read_text() == "mine"
    command = ["export", str(pruned), "--to", "gguf", "--output", str(path), "--overwrite"]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    assert path.read_bytes().startswith(b"GGUF")


def test_a_place_where_no_file_can_be_is_refused(pruned: Path, tmp_path: Path) -> None:
    assert "is a directory: name a file" in refused(pruned, "--output", tmp_path)
    assert "there is no directory" in refused(pruned, "--output", tmp_path / "none" / "model.gguf")


def test_without_the_package_one_line_says_what_to_install(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    before = content(pruned.parent)
    assert refused(pruned).endswith("not installed: pip install -e '.[gguf]' in slimllm's checkout")
    assert content(pruned.parent) == before


def test_what_is_no_pruned_checkpoint_is_refused(pruned: Path, tmp_path: Path) -> None:
    assert "none is not a directory: pass what slimllm prune wrote" in refused(tmp_path / "none")
    assert "dense is not a pruned model (its type is llama)" in refused(pruned.parent / "dense")
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in refused(tmp_path / "empty")


@pytest.mark.parametrize(
    "model_type", [one.model_type for one in FAMILIES if one.model_type not in ("llama", "mistral", "qwen2")]
)
def test_other_families_are_refused(tmp_path: Path, model_type: str) -> None:
    source = save_tiny(family_named(model_type), tmp_path / "dense")
    directory = prune(source, tmp_path / "pruned", untouched)
    line = refused(directory)
    assert f"{family_named(model_type).name} is not a Llama in llama.cpp; supported: llama, mistral, qwen2" in line


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "its sliding_window is 8, of 64 positions"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "its sliding_window is 8, of 64 positions",
        ),
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is gelu, llama.cpp's is silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "its RoPE scaling is dynamic; supported: default, linear, llama3, yarn",
        ),
        (
            "llama",
            {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
            "RoPE rotates 4 of 8 dimensions per head, llama.cpp all",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, model_type: str, settings: dict[str, Any], reason: str
) -> None:
    directory = prune(save_tiny(family_named(model_type), tmp_path / "dense", **settings), tmp_path / "pruned")
    assert reason in refused(directory)
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_full_disk_leaves_nothing(gguf: Any, pruned: Path) -> None:
    before = content(pruned.parent)
    with files_of_at_most(20_000):
        result = CliRunner().invoke(main, ["export", str(pruned), "--to", "gguf"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"slimllm: the system refused {pruned}.gguf: ")
    assert content(pruned.parent) == before


def test_a_damaged_weight_leaves_nothing(gguf: Any, pruned: Path) -> None:
    checkpoint = Checkpoint.open(pruned)
    tensors = checkpoint.read_layer(2)
    tensors["mlp.up_proj.weight"][0, 0] = torch.nan
    CheckpointWriter(checkpoint, pruned).write_tensors(2, tensors)
    before = content(pruned.parent)
    assert "layer 2 of" in refused(pruned)
    assert content(pruned.parent) == before
