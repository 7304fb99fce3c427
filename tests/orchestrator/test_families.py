"""The contract of a family: what each does once it is pruned, by both methods and any number of workers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.pipeline import PruneResult
from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.families import FAMILIES, Family
from slimllm_ops.plan import Plan
from tests.orchestrator.conftest import PruneModel
from tests.tiny import save_tiny

# Loads every model that it is given where the package is not, and keeps its logits.
ELSEWHERE = """
import sys, torch
sys.modules["slimllm_ops"] = None
from transformers import AutoModelForCausalLM

ids = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with torch.inference_mode():
        torch.save(model(ids).logits, directory + ".pt")
"""

Runs = dict[str, PruneResult]


@pytest.fixture(scope="module")
def ids(token_blocks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(token_blocks[:3].astype(np.int64))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of every family."""
    return {family.name: save_tiny(family, tmp_path_factory.mktemp(family.name)) for family in FAMILIES}


@pytest.fixture(scope="module")
def runs(prune_model: PruneModel, dense: dict[str, Path]) -> Runs:
    """Every family pruned by `gram` with one worker."""
    return {name: prune_model(directory, method="gram") for name, directory in dense.items()}


def load(run: PruneResult, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(run.output, **settings).eval()


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def each_family(test: Any) -> Any:
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)(test)


@each_family
def test_a_third_is_gone_and_what_is_left_is_what_the_plan_says(family: Family, runs: Runs) -> None:
    run, model = runs[family.name], load(runs[family.name])
    plan = Plan.read(run.output / "pruning" / "plan.json")
    assert run.totals.sparsity == pytest.approx(0.33, abs=0.01)
    for index, layer in enumerate(plan.layers):
        if layer.mlp is not None:
            width = model.get_submodule(f"{family.layers}.{index}.{family.mlp.output}").in_features
            assert width == len(layer.mlp.kept)
        assert layer.attention is None or not family.attention.reading.whole
    assert any(layer.attention for layer in plan.layers) != bool(family.attention.reading.whole)


@each_family
@pytest.mark.parametrize("method", ["slimllm", "gram"])
def test_any_number_of_workers_gives_the_same_model(
    family: Family, method: str, runs: Runs, dense: dict[str, Path], prune_model: PruneModel
) -> None:
    one = runs[family.name] if method == "gram" else prune_model(dense[family.name], method=method)
    three = prune_model(dense[family.name], method=method, workers=3)
    plans = [Plan.read(run.output / "pruning" / "plan.json") for run in (one, three)]
    for layer, other in zip(*(plan.layers for plan in plans), strict=True):
        for decision, same in ((layer.attention, other.attention), (layer.mlp, other.mlp)):
            assert (decision and decision.kept) == (same and same.kept)
    checkpoints = [Checkpoint.open(run.output) for run in (one, three)]
    for index in range(3):
        tensors, others = (checkpoint.read_layer(index) for checkpoint in checkpoints)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5)


@each_family
def test_every_attention_computes_the_same(family: Family, runs: Runs, ids: torch.Tensor) -> None:
    model = load(runs[family.name], attn_implementation="eager")
    expected = logits(model, ids)
    if not model._supports_sdpa:
        pytest.skip("transformers has eager attention alone for this family")
    torch.testing.assert_close(logits(load(runs[family.name], attn_implementation="sdpa"), ids), expected)


@each_family
def test_generation_with_a_cache_is_the_one_without(family: Family, runs: Runs, ids: torch.Tensor) -> None:
    model, settings = load(runs[family.name]), {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape == (3, 26)


@each_family
def test_tied_embeddings_stay_tied(family: Family, runs: Runs, dense: dict[str, Path]) -> None:
    before = AutoModelForCausalLM.from_pretrained(dense[family.name])
    for model in (before, load(runs[family.name])):
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == before.config.tie_word_embeddings


def test_every_family_loads_where_the_package_is_not(runs: Runs, ids: torch.Tensor, tmp_path: Path) -> None:
    torch.save(ids, tmp_path / "ids.pt")
    directories = [str(run.output) for run in runs.values()]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "ids.pt"), *directories]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for run in runs.values():
        torch.testing.assert_close(torch.load(f"{run.output}.pt"), logits(load(run), ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Olmo2", "OPT", "Phi3", "GPTNeoX"])
def test_refining_brings_every_build_nearer_to_the_dense_model(
    name: str, runs: Runs, dense: dict[str, Path], prune_model: PruneModel, token_blocks: np.ndarray
) -> None:
    every = torch.from_numpy(token_blocks.astype(np.int64))
    expected = logits(AutoModelForCausalLM.from_pretrained(dense[name]).eval(), every)
    refined = prune_model(dense[name], method="gram", refine=True)
    before, after = ((logits(load(run), every) - expected).square().mean() for run in (runs[name], refined))
    assert after < 0.9 * before
