"""A run prunes the model that transformers loads, whatever the form of its directory, and says what is unusual."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.config import PruneConfig
from orchestrator.inputs import load_inputs
from slimllm_ops.models.families import family_named
from tests.conftest import content
from tests.orchestrator.conftest import PruneModel
from tests.slimllm_ops.checkpoint.source_forms import (
    Change,
    names_of_the_base_model,
    old_shards_and_a_newer_file,
    only_the_head_is_there,
    the_head_is_another,
)
from tests.slimllm_ops.checkpoint.test_float8 import SIZES, in_float8, saved_by_transformers
from tests.tiny import save_tiny


def perplexity_of(directory: Path, blocks: np.ndarray) -> float:
    """Return a model's perplexity, from transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        losses = [float(model(row[None], labels=row[None]).loss) for row in torch.from_numpy(blocks).long()]
    return float(torch.tensor(losses).mean().exp())


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (the_head_is_another, "slimllm does not tie them"),
        (only_the_head_is_there, ""),
        (names_of_the_base_model, ""),
        (old_shards_and_a_newer_file, "transformers loads model.safetensors"),
    ],
)
def test_both_perplexities_are_of_what_transformers_loads(
    prune_model: PruneModel,
    change: Change,
    warning: str,
    held_out_blocks: np.ndarray,
    held_out_file: Path,
    tmp_path: Path,
) -> None:
    family = family_named("llama")
    change(family, save_tiny(family, tmp_path))
    run = prune_model(tmp_path, evaluate=(str(held_out_file),), refine=True, method="gram")
    ((dense, pruned),) = run.totals.perplexity.values()
    assert dense == pytest.approx(perplexity_of(tmp_path, held_out_blocks), rel=1e-4)
    assert pruned == pytest.approx(perplexity_of(run.output, held_out_blocks), rel=1e-4)
    tied = json.loads((Path(run.output) / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (change is not the_head_is_another)
    told: list[str] = []
    load_inputs(PruneConfig(model=str(tmp_path), calibration=str(held_out_file)), told.append)
    assert [warning in line for line in told] == [True] * bool(warning)


@pytest.mark.parametrize("settings", [{}, {"method": "gram", "refine": True}], ids=["slimllm", "gram"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_of_float8_the_model_that_transformers_restores_is_pruned(
    prune_model: PruneModel, settings: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    if model_type == "mixtral" and settings:
        settings = {"method": "gram"}
    family = family_named(model_type)
    in_float8(family, save_tiny(family, tmp_path / "float8", **SIZES))
    saved_by_transformers(tmp_path / "float8", tmp_path / "restored")
    pruned, expected = (prune_model(tmp_path / name, **settings) for name in ("float8", "restored"))
    written, wanted = content(Path(pruned.output)), content(Path(expected.output))
    names = [name for name in wanted if name.endswith(".safetensors") or name == "config.json"]
    assert len(names) > 3
    assert [name for name in names if written[name] != wanted[name]] == []
    # Files have headers, and those of scales.
    assert pruned.totals.bytes_before == pytest.approx(expected.totals.bytes_before, rel=0.1)
