"""The contract of a family: what each does once it is pruned, by both methods and any number of workers."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.group import ShardGroup
from actors.placement import Placement
from actors.pool import SolverPool
from actors.serving import shared_files
from orchestrator.config import PruneConfig
from orchestrator.inputs import load_inputs
from orchestrator.output.staging import staged
from orchestrator.pipeline import complete, pruner_of, tracking_options
from orchestrator.progress import Reporter
from orchestrator.pruning.run_context import Job, open_targets
from orchestrator.tracking import tracked_run
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.models.families import FAMILIES, Family
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


@dataclass(frozen=True)
class Pruned:
    """What came of a family's model: the checkpoint, and the plan that it was written by."""

    output: Path
    plans: list[LayerPlan]
    sparsity: float


Runs = dict[str, Pruned]


@dataclass(frozen=True)
class Workers:
    """Workers that stay, so that not every model has to wait for its own to start."""

    placement: Placement
    shards: ShardGroup
    token_file: Path
    tracking_uri: str

    def prune(self, model: Path, output: Path, **settings: Any) -> Pruned:
        """Prune a model by a third as the command line does, but for the record."""
        given: dict[str, Any] = {"calibration": str(self.token_file), "tracking_uri": self.tracking_uri}
        config = PruneConfig(model=str(model), sparsity=(0.33,), **given, **settings)
        inputs, journal = load_inputs(config), Path("pruning/metrics.jsonl")
        with (
            staged(output, overwrite=False) as staging,
            tracked_run(tracking_options(config), staging.directory / journal) as run,
            open_targets(config, staging, inputs.source, run) as (target,),
        ):
            pool, reporter = SolverPool(inputs.source, self.placement), Reporter(Console(file=io.StringIO()))
            job = Job(config, inputs, self.shards, pool, staging, reporter)
            pruner_of(config.method)(job, [target])
            totals = complete(job, target)
        return Pruned(output, target.final.log.plans, totals.sparsity)


@pytest.fixture(scope="module")
def workers(local_ray: None, token_file: Path, tracking_uri: str) -> Iterator[dict[int, Workers]]:
    """One worker, and three."""
    with ExitStack() as stack:
        made = {}
        for number in (1, 3):
            placement = stack.enter_context(Placement(number, 1, 0.0))
            shards = stack.enter_context(ShardGroup(placement, stack.enter_context(shared_files()), print))
            made[number] = Workers(placement, shards, token_file, tracking_uri)
        yield made


@pytest.fixture(scope="module")
def ids(token_blocks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(token_blocks[:3].astype(np.int64))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of every family."""
    return {family.name: save_tiny(family, tmp_path_factory.mktemp(family.name)) for family in FAMILIES}


@pytest.fixture(scope="module")
def runs(workers: dict[int, Workers], dense: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every family pruned by `gram` with one worker."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: workers[1].prune(model, folder / name, method="gram") for name, model in dense.items()}


def load(run: Pruned, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(run.output, **settings).eval()


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def each_family(test: Any) -> Any:
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)(test)


@each_family
def test_a_third_is_gone_and_what_is_left_is_what_the_plan_says(family: Family, runs: Runs) -> None:
    run, model = runs[family.name], load(runs[family.name])
    assert run.sparsity == pytest.approx(0.33, abs=0.01)
    for index, layer in enumerate(run.plans):
        if layer.mlp is not None:
            weight = dict(model.get_submodule(f"{family.layers}.{index}").named_parameters())[family.mlp.output_weight]
            assert weight.numel() // weight.shape[-2] == len(layer.mlp.kept)
        assert layer.attention is None or not family.attention.reading.whole


@each_family
@pytest.mark.parametrize("method", ["slimllm", "gram"])
def test_any_number_of_workers_gives_the_same_model(
    family: Family, method: str, runs: Runs, dense: dict[str, Path], workers: dict[int, Workers], tmp_path: Path
) -> None:
    model = dense[family.name]
    one = runs[family.name] if method == "gram" else workers[1].prune(model, tmp_path / "one", method=method)
    three = workers[3].prune(model, tmp_path / "three", method=method)
    if method == "slimllm":
        # Its ratios are those of heads and channels alike.
        assert any(layer.attention for layer in one.plans) != bool(family.attention.reading.whole)
    for layer, other in zip(one.plans, three.plans, strict=True):
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
    found = logits(load(runs[family.name], attn_implementation="sdpa"), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
    name: str,
    runs: Runs,
    dense: dict[str, Path],
    workers: dict[int, Workers],
    token_blocks: np.ndarray,
    tmp_path: Path,
) -> None:
    every = torch.from_numpy(token_blocks.astype(np.int64))
    expected = logits(AutoModelForCausalLM.from_pretrained(dense[name]).eval(), every)
    refined = workers[1].prune(dense[name], tmp_path / "refined", method="gram", refine=True)
    before, after = ((logits(load(run), every) - expected).square().mean() for run in (runs[name], refined))
    assert after < 0.9 * before
