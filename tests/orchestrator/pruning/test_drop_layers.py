"""Whole runs that drop layers: which layers go, how the rest is pruned, and that the model loads."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator import PruneConfig
from orchestrator.config import ConfigError
from orchestrator.exports.stock import export_stock
from orchestrator.pipeline import PruneResult, calibrate, prune
from orchestrator.progress import Reporter
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Plan
from slimllm_ops.errors import InputError
from tests.conftest import content
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.pruning.test_resume import Disturbed, interrupt

IDLE = 1
SETTINGS: dict[str, Any] = {"method": "gram", "drop_layers": True}


@pytest.fixture(scope="module")
def idle_model(make_llama: Callable[..., Path]) -> Path:
    """A model of four layers, of which one adds next to nothing to the stream."""
    directory = make_llama(num_key_value_heads=2, num_hidden_layers=4)
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{IDLE}.{name}.weight"] *= 1e-4
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def dropped(prune_model: PruneModel, idle_model: Path, held_out_file: Path, tracking_uri: str) -> PruneResult:
    return prune_model(idle_model, evaluate=(str(held_out_file),), tracking_uri=tracking_uri, **SETTINGS)


def plan_of(output: Path) -> list[bool]:
    return [layer.dropped for layer in Plan.read(output / "pruning" / "plan.json").layers]


def test_the_idle_layer_goes_and_the_rest_is_pruned_until_the_sparsity_is_met(dropped: PruneResult) -> None:
    assert plan_of(dropped.output) == [layer == IDLE for layer in range(4)]
    totals = dropped.totals
    assert (totals.layers_before, totals.layers_after) == (4, 3)
    channel = 3 * 32 / totals.layer_parameters_before
    assert 0.33 - channel < totals.sparsity <= 0.33
    assert totals.read_back_error < 1e-4


def test_the_model_loads_and_has_the_perplexity_that_was_measured(dropped: PruneResult, held_out_blocks: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(dropped.output)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    ids = torch.from_numpy(held_out_blocks).long()
    with torch.inference_mode():
        losses = [float(model(row[None], labels=row[None]).loss) for row in ids]
    ((_, perplexity),) = dropped.totals.perplexity.values()
    assert perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)


def test_mlflow_and_the_card_tell_of_layers(dropped: PruneResult, tracking_uri: str) -> None:
    client = MlflowClient(tracking_uri)
    assert dropped.run_id is not None
    changes = {metric.step: metric.value for metric in client.get_metric_history(dropped.run_id, "relative_change")}
    assert sorted(changes) == [0, 1, 2, 3]
    assert min(changes, key=changes.__getitem__) == IDLE
    heads = {metric.step: metric.value for metric in client.get_metric_history(dropped.run_id, "heads_kept")}
    assert heads[IDLE] == 0
    assert "| decoder layers | 4 | 3 |" in (dropped.output / "README.md").read_text()


def test_a_uniform_model_is_a_stock_one_still(
    prune_model: PruneModel, idle_model: Path, tmp_path: Path, held_out_blocks: Any
) -> None:
    run = prune_model(idle_model, uniform=True, no_bias=True, multiple_of=4, **SETTINGS)
    assert plan_of(run.output)[IDLE]
    export_stock(run.output, tmp_path / "stock", overwrite=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(model).__module__.startswith("transformers.")
    ids = torch.from_numpy(held_out_blocks[:2]).long()
    pruned = AutoModelForCausalLM.from_pretrained(run.output)
    assert torch.equal(model(ids).logits, pruned(ids).logits)


def test_without_being_asked_no_layer_goes(prune_model: PruneModel, idle_model: Path) -> None:
    assert not any(plan_of(prune_model(idle_model, method="gram").output))


@pytest.mark.slow
def test_one_worker_and_three_drop_the_same(prune_model: PruneModel, idle_model: Path, dropped: PruneResult) -> None:
    several = prune_model(idle_model, workers=3, **SETTINGS)
    one, three = (Plan.read(run.output / "pruning" / "plan.json").layers for run in (dropped, several))
    kept = [[(layer.dropped, layer.attention and layer.attention.kept) for layer in layers] for layers in (one, three)]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_it_is_refined_and_resumed_to_the_same_bytes_and_nearer_to_the_dense_model(
    idle_model: Path, token_file: Path, tmp_path: Path
) -> None:
    config = PruneConfig(
        model=str(idle_model),
        calibration=str(token_file),
        evaluate=(str(token_file),),
        tracking_uri="none",
        local=True,
        sparsity=0.45,
        output=str(tmp_path / "undisturbed"),
        refine=True,
        **SETTINGS,
    )
    refined = prune(config, Disturbed([]))
    assert any(plan_of(refined.output))
    disturbed = replace(config, output=str(tmp_path / "out"))
    for stage in ("deciding", "refining"):
        with pytest.raises(KeyboardInterrupt):
            prune(replace(disturbed, resume=stage == "refining"), Disturbed([(stage, 2, interrupt)]))
    prune(replace(disturbed, resume=True), Disturbed([]))
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    plain = prune(replace(config, refine=False, output=str(tmp_path / "plain")), Disturbed([]))
    (loss,), (refined_loss,) = (run.totals.perplexity.values() for run in (plain, refined))
    assert refined_loss[1] < loss[1]


def test_what_lost_layers_is_pruned_again(prune_model: PruneModel, dropped: PruneResult) -> None:
    again = prune_model(dropped.output, sparsity=0.3, method="slimllm")
    assert len(plan_of(again.output)) == Checkpoint.open(again.output).num_layers == 3


def test_kept_moments_serve_where_they_were_kept_for_it(
    prune_model: PruneModel, idle_model: Path, token_file: Path, tmp_path: Path, dropped: PruneResult
) -> None:
    reporter = Reporter(Console(file=io.StringIO()))
    kept = PruneConfig(
        model=str(idle_model), calibration=str(token_file), local=True, output=str(tmp_path / "kept"), **SETTINGS
    )
    moments = str(calibrate(kept, reporter))
    run = prune_model(idle_model, moments=moments, calibration=None, **SETTINGS)
    weights = [load_file(output / "model-00001.safetensors") for output in (run.output, dropped.output)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    plain = replace(kept, drop_layers=False, output=str(tmp_path / "plain"))
    moments = str(calibrate(plain, reporter))
    with pytest.raises(InputError, match=r"do not say what each layer changes.*run `slimllm calibrate --drop-layers`"):
        prune_model(idle_model, moments=moments, calibration=None, **SETTINGS)


def test_the_papers_method_drops_none() -> None:
    with pytest.raises(ConfigError, match="drop_layers belongs to --method gram"):
        PruneConfig(drop_layers=True)
