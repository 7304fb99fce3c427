"""`gram` in the whole pipeline, on a real Ray and a real MLflow store."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from orchestrator import PruneConfig
from orchestrator.cli.summary import print_summary
from orchestrator.pipeline import PruneResult, calibrate
from orchestrator.progress import Reporter
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Plan
from slimllm_ops.errors import InputError

PruneModel = Callable[..., PruneResult]


def kept_units(directory: Path) -> list[list[tuple[int, ...] | None]]:
    """Return what every layer keeps, attention and MLP; None where a module is whole."""
    layers = Plan.read(directory / "pruning" / "plan.json").layers
    return [[one and one.kept for one in (layer.attention, layer.mlp)] for layer in layers]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(directory)
    return checkpoint.read(list(checkpoint.files))


def assert_same_model(found: Path, expected: Path) -> None:
    assert kept_units(found) == kept_units(expected)
    reference = tensors_of(expected)
    for name, tensor in tensors_of(found).items():
        assert float((tensor - reference[name]).norm()) <= 1e-5 * float(reference[name].norm()), name


@pytest.fixture(scope="module")
def sweep(prune_model: PruneModel, gqa_model: Path, held_out_file: Path, tracking_uri: str) -> PruneResult:
    """Two sparsities from one pass, tracked in MLflow."""
    evaluate = (str(held_out_file),)
    return prune_model(gqa_model, method="gram", sparsity=(0.2, 0.45), evaluate=evaluate, tracking_uri=tracking_uri)


@pytest.fixture(scope="module")
def moments(gqa_model: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("moments") / "kept"
    config = PruneConfig(model=str(gqa_model), calibration=str(token_file), output=str(output), local=True)
    return calibrate(config, Reporter(Console(file=io.StringIO())))


def test_every_sparsity_has_a_checkpoint_that_meets_it_within_a_channel(sweep: PruneResult, gqa_model: Path) -> None:
    channel = 3 * Checkpoint.open(gqa_model).config.hidden_size
    assert [model.output.name for model in sweep.models] == ["sparsity-0.20", "sparsity-0.45"]
    for model, asked in zip(sweep.models, (0.2, 0.45), strict=True):
        totals = model.totals
        removed = totals.layer_parameters_before - totals.layer_parameters_after
        assert 0 <= asked * totals.layer_parameters_before - removed < channel
        loaded = AutoModelForCausalLM.from_pretrained(model.output)
        assert sum(parameter.numel() for parameter in loaded.parameters()) == totals.parameters_after
        loss = float(torch.as_tensor(math.log(model.totals.perplexity.popitem()[1][1])))
        assert math.isfinite(loss)


def test_a_sweep_is_a_parent_run_with_a_child_for_every_sparsity(sweep: PruneResult, tracking_uri: str) -> None:
    client = MlflowClient(tracking_uri)
    assert sweep.experiment_id is not None
    children = client.search_runs(
        [sweep.experiment_id], f"tags.`mlflow.parentRunId` = '{sweep.run_id}'", order_by=["attribute.start_time"]
    )
    assert {child.info.run_id for child in children} == {model.run_id for model in sweep.models}
    for child in children:
        assert child.info.status == "FINISHED"
        assert "perplexity_after" in child.data.metrics
        steps = [metric.step for metric in client.get_metric_history(child.info.run_id, "channels_kept")]
        assert sorted(steps) == [0, 1, 2]


def test_what_a_smaller_model_keeps_a_larger_one_keeps_too(sweep: PruneResult) -> None:
    small, large = (kept_units(model.output) for model in reversed(sweep.models))
    for modules_small, modules_large in zip(small, large, strict=True):
        for few, many in zip(modules_small, modules_large, strict=True):
            assert many is None or (few is not None and set(few) <= set(many))


@pytest.mark.parametrize("workers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_models(
    sweep: PruneResult, prune_model: PruneModel, gqa_model: Path, workers: int
) -> None:
    result = prune_model(gqa_model, method="gram", sparsity=0.45, workers=workers)
    assert_same_model(result.output, sweep.models[1].output)


def test_kept_moments_give_the_same_model_with_no_pass_over_the_data(
    sweep: PruneResult, prune_model: PruneModel, gqa_model: Path, moments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = prune_model(gqa_model, method="gram", sparsity=0.45, moments=str(moments), calibration=None)
    assert "calibrating" not in result.totals.seconds
    assert result.totals.peak_memory == {}, "no worker was started"
    print_summary(result)
    assert "peak memory" not in capsys.readouterr().out
    assert_same_model(result.output, sweep.models[1].output)


def test_moments_of_other_weights_are_refused(
    prune_model: PruneModel, moments: Path, make_llama: Callable[..., Path]
) -> None:
    other = make_llama(num_key_value_heads=2, initializer_range=0.2)
    with pytest.raises(InputError, match="slimllm calibrate"):
        prune_model(other, method="gram", sparsity=0.2, moments=str(moments), calibration=None)


def test_moments_that_are_not_whole_are_refused(prune_model: PruneModel, gqa_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"moments\.json is missing"):
        prune_model(gqa_model, method="gram", sparsity=0.2, moments=str(tmp_path), calibration=None)


@pytest.fixture(scope="module")
def refined(prune_model: PruneModel, gqa_model: Path, held_out_file: Path) -> PruneResult:
    return prune_model(gqa_model, method="gram", sparsity=0.45, refine=True, evaluate=(str(held_out_file),))


def test_refinement_changes_weights_and_nothing_else(refined: PruneResult, sweep: PruneResult) -> None:
    assert kept_units(refined.output) == kept_units(sweep.models[1].output)
    before, after = tensors_of(sweep.models[1].output), tensors_of(refined.output)
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The first attention's input is the dense one's, so there is nothing to align.
    assert not any("layers.0.self_attn.q_proj" in name for name in changed)
    assert any("layers.1.self_attn.q_proj" in name for name in changed)
    assert any("down_proj" in name for name in changed)


def test_refinement_brings_the_calibration_tokens_nearer_to_the_dense_model(
    refined: PruneResult, sweep: PruneResult, gqa_model: Path, token_blocks: np.ndarray
) -> None:
    ids = torch.from_numpy(token_blocks.astype(np.int64))

    def last_states(model: Path) -> Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(model)(ids, output_hidden_states=True).hidden_states[-1]

    dense = last_states(gqa_model)
    plain, corrected = last_states(sweep.models[1].output), last_states(refined.output)
    assert (corrected - dense).norm() < 0.95 * (plain - dense).norm()


def test_refinement_is_the_same_with_any_number_of_workers(
    refined: PruneResult, prune_model: PruneModel, gqa_model: Path
) -> None:
    result = prune_model(gqa_model, method="gram", sparsity=0.45, refine=True, workers=3)
    assert_same_model(result.output, refined.output)


@pytest.mark.parametrize(("refine", "gap"), [(False, 0.027), (True, 0.021)])
def test_gram_stays_closer_to_the_dense_model_than_the_prototype_did(
    shared: Path, prune_model: PruneModel, refine: bool, gap: float
) -> None:
    recorded = json.loads((shared / "golden" / "babyllama-mha-0.25" / "decisions.json").read_text())
    tokens = shared / "golden" / "tokens"
    held_out = str(tokens / "babyllama.heldout.parquet")
    model = shared / "models" / "babyllama-mha"
    settings: dict[str, Any] = {"refine": refine, "calibration": str(tokens / "babyllama.calibration.parquet")}
    # As many parameters as the published method leaves at ratio .25.
    layers = Checkpoint.open(model)
    in_layers = sum(layers.num_parameters(layers.layer_names(layer)) for layer in range(layers.num_layers))
    sparsity = (recorded["params_before"] - recorded["params_after"] + 0.5) / in_layers
    result = prune_model(model, method="gram", sparsity=sparsity, evaluate=(held_out,), **settings)

    dense, pruned = (math.log(perplexity) for perplexity in result.totals.perplexity[held_out])
    assert result.totals.parameters_after <= recorded["params_after"] + 3 * 128
    assert (pruned - dense) / (recorded["pruned_heldout_loss"] - recorded["dense_heldout_loss"]) < gap
