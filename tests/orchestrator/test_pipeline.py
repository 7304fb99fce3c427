"""Whole runs on a real local Ray and a real MLflow store: what they write, and that it is correct."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.pipeline import PruneResult
from orchestrator.pruning import finish
from orchestrator.tracking.journal import Journal
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.surgery import prune_layer
from slimllm_ops.decide.plan import Plan
from slimllm_ops.errors import ReadBackError
from tests.elsewhere import Elsewhere


@pytest.fixture(scope="module")
def ids(token_blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(token_blocks[:3].astype(np.int64))


@pytest.fixture(scope="module")
def pruned(gqa_run: PruneResult) -> PreTrainedModel:
    return load(gqa_run.output)


def load(directory: Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **settings).eval()


def logits(model: PreTrainedModel, ids: Tensor, **call: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids, **call).logits


def loss(model: PreTrainedModel, ids: Tensor) -> float:
    predicted = logits(model, ids)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten()))


# ---- The checkpoint


def test_a_run_leaves_every_file_it_promises(gqa_run: PruneResult) -> None:
    left = {str(path.relative_to(gqa_run.output)) for path in gqa_run.output.rglob("*") if path.is_file()}
    weights = {f"model-{number:05d}.safetensors" for number in range(1, 7)}
    described = {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "pruned_layers.py",
        "pruned_llama.py",
        "README.md",
        "complete.json",
    }
    figures = {"figures/kept.png", "figures/scores.png"}
    record = {"asked.json", "run.toml", "plan.json", "importance.parquet", "metrics.jsonl", "report.html"} | figures
    assert left == weights | described | {f"pruning/{name}" for name in record}
    beside = [path for path in gqa_run.output.parent.iterdir() if path != gqa_run.output]
    assert not beside


def test_it_loads_where_this_project_is_not(
    gqa_run: PruneResult, pruned: PreTrainedModel, ids: Tensor, elsewhere: Elsewhere
) -> None:
    torch.testing.assert_close(elsewhere.logits(gqa_run.output, ids), logits(pruned, ids), rtol=1e-5, atol=1e-6)


def test_generation_with_a_cache_is_the_one_without(pruned: PreTrainedModel, ids: Tensor) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = pruned.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, pruned.generate(ids, use_cache=False, **settings))
    assert cached.shape == (3, 28)


def test_rows_padded_on_the_left_are_the_rows_alone(pruned: PreTrainedModel, ids: Tensor) -> None:
    lengths = (16, 11, 5)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, -length:], mask[row, -length:] = ids[row, :length], 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    together = logits(pruned, padded, attention_mask=mask, position_ids=positions)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row, -length:], logits(pruned, ids[row : row + 1, :length])[0])


def test_eager_and_sdpa_attention_agree(gqa_run: PruneResult, ids: Tensor) -> None:
    eager, sdpa = (load(gqa_run.output, attn_implementation=kind) for kind in ("eager", "sdpa"))
    torch.testing.assert_close(logits(eager, ids), logits(sdpa, ids))


def test_saved_again_it_is_the_same(pruned: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), ids), logits(pruned, ids))


@pytest.fixture(scope="module")
def untracked_run(make_llama: Callable[..., Path], prune_model: Callable[..., PruneResult]) -> PruneResult:
    """A run in bfloat16, while the tracking server is down."""
    model = make_llama(torch.bfloat16, num_key_value_heads=2, num_hidden_layers=2)
    return prune_model(model, tracking_uri="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def half_run(make_llama: Callable[..., Path], prune_model: Callable[..., PruneResult]) -> PruneResult:
    """A run in float16."""
    return prune_model(make_llama(torch.float16, num_key_value_heads=2, num_hidden_layers=2))


@pytest.mark.parametrize(("run", "dtype"), [("half_run", torch.float16), ("untracked_run", torch.bfloat16)])
def test_the_dtype_is_the_sources(run: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    output = request.getfixturevalue(run).output
    stored = [tensor.dtype for path in output.glob("*.safetensors") for tensor in load_file(path).values()]
    assert set(stored) == {dtype}
    assert {parameter.dtype for parameter in load(output).parameters()} == {dtype}


def test_the_sparsity_is_met_within_one_channel(gqa_run: PruneResult, gqa_model: Path, pruned: PreTrainedModel) -> None:
    source = load(gqa_model)
    before, after = (
        sum(parameter.numel() for parameter in model.model.layers.parameters()) for model in (source, pruned)
    )
    missing = int(0.33 * before) - (before - after)
    one_channel = 3 * source.config.hidden_size
    assert 0 <= missing < one_channel
    totals = gqa_run.totals
    assert (totals.layer_parameters_before, totals.layer_parameters_after) == (before, after)
    assert totals.parameters_after == sum(parameter.numel() for parameter in pruned.parameters())
    assert totals.sparsity == pytest.approx(1 - after / before)


def test_the_plan_and_the_source_rebuild_the_very_same_tensors(gqa_run: PruneResult, gqa_model: Path) -> None:
    source, written = Checkpoint.open(gqa_model), Checkpoint.open(gqa_run.output)
    plan = Plan.read(gqa_run.output / "pruning" / "plan.json")
    assert len(plan.layers) == source.num_layers
    assert any(layer.attention for layer in plan.layers)
    assert any(layer.mlp for layer in plan.layers)
    for number, layer in enumerate(plan.layers):
        rebuilt = prune_layer(source.read_layer(number), source.family, layer)
        found = written.read_layer(number)
        assert rebuilt.keys() == found.keys()
        for name, tensor in rebuilt.items():
            assert torch.equal(tensor, found[name]), name


def test_importance_has_a_row_for_every_unit_of_a_pruned_module(gqa_run: PruneResult) -> None:
    rows = pq.read_table(gqa_run.output / "pruning" / "importance.parquet").to_pylist()
    plan = Plan.read(gqa_run.output / "pruning" / "plan.json")
    for number, layer in enumerate(plan.layers):
        for module, decision in (("attention", layer.attention), ("mlp", layer.mlp)):
            own = [row for row in rows if (row["layer"], row["module"]) == (number, module)]
            assert [row["unit"] for row in own] == list(range(decision.num_units if decision else 0))
            if decision:
                assert tuple(row["unit"] for row in own if row["kept"]) == decision.kept
                assert tuple(row["score"] for row in own) == decision.scores


def test_the_perplexities_are_those_of_the_models_as_transformers_runs_them(
    gqa_run: PruneResult, gqa_model: Path, pruned: PreTrainedModel, held_out_blocks: np.ndarray
) -> None:
    ids = torch.from_numpy(held_out_blocks.astype(np.int64))
    ((dense, after),) = gqa_run.totals.perplexity.values()
    assert math.log(dense) == pytest.approx(loss(load(gqa_model), ids), abs=1e-4)
    assert math.log(after) == pytest.approx(loss(pruned, ids), abs=1e-4)


# ---- The record


def test_the_run_in_mlflow_says_what_it_was_and_what_came_of_it(gqa_run: PruneResult, gqa_model: Path) -> None:
    client = MlflowClient(gqa_run.tracking_uri)
    run = client.get_run(gqa_run.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "the run")
    asked = {name: run.data.params[name] for name in ("model", "method", "sparsity", "seed", "num_workers")}
    assert asked == {"model": str(gqa_model), "method": "slimllm", "sparsity": "0.33", "seed": "0", "num_workers": "1"}
    assert {"calibration_digest", "torch_version", "ray_version", "cpus_per_worker"} <= run.data.params.keys()
    totals = gqa_run.totals
    assert run.data.metrics["parameters_after"] == totals.parameters_after
    assert run.data.metrics["perplexity_after"] == totals.perplexity.popitem()[1][1]
    assert run.data.metrics["seconds/pruning"] > 0
    assert {"parameters_before", "perplexity_before", "tokens_per_second", "peak_memory_bytes/host"} <= (
        run.data.metrics.keys()
    )
    contexts = [data.tags[0].value for data in run.inputs.dataset_inputs]
    assert sorted(contexts) == ["calibration", "evaluation"]
    digest = run.inputs.dataset_inputs[0].dataset.digest
    assert run.data.params["calibration_digest"].startswith(digest)


def test_the_layers_metrics_have_the_layer_as_their_step_in_mlflow_and_in_the_journal(gqa_run: PruneResult) -> None:
    client = MlflowClient(gqa_run.tracking_uri)
    plan = Plan.read(gqa_run.output / "pruning" / "plan.json")
    events = [
        event
        for event in Journal.read(gqa_run.output / "pruning" / "metrics.jsonl")
        if event["event"] == "metrics" and event["step"] is not None
    ]
    assert [event["step"] for event in events] == [0, 1, 2]
    names = {"cosine", "ratio", "heads_kept", "channels_kept", "attention_relative_error", "mlp_relative_error"}
    for name in names:
        history = client.get_metric_history(gqa_run.run_id, name)
        assert [(point.step, point.value) for point in history] == [(e["step"], e["metrics"][name]) for e in events]
    for event, layer in zip(events, plan.layers, strict=True):
        assert event["metrics"]["channels_kept"] == (len(layer.mlp.kept) if layer.mlp else 48)
        # Two query heads go with every key/value head.
        assert event["metrics"]["heads_kept"] == (2 * len(layer.attention.kept) if layer.attention else 4)


def test_the_totals_in_the_journal_are_those_in_mlflow(gqa_run: PruneResult) -> None:
    events = Journal.read(gqa_run.output / "pruning" / "metrics.jsonl")
    (totals,) = [event["metrics"] for event in events if event["event"] == "metrics" and event["step"] is None]
    stored = MlflowClient(gqa_run.tracking_uri).get_run(gqa_run.run_id).data.metrics
    assert totals == {name: stored[name] for name in totals}
    assert [event["event"] for event in (*events[:2], *events[-2:])] == ["start", "stored", "end", "logged"]
    assert events[-2]["status"] == "FINISHED"


def test_the_files_beside_the_weights_are_artifacts(gqa_run: PruneResult) -> None:
    client = MlflowClient(gqa_run.tracking_uri)
    artifacts = {file.path for file in client.list_artifacts(gqa_run.run_id, "pruning")}
    assert {"pruning/plan.json", "pruning/importance.parquet", "pruning/figures"} <= artifacts


def test_the_registered_model_is_the_checkpoint(
    gqa_run: PruneResult, pruned: PreTrainedModel, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gqa_run.model_uri == "models:/tiny/1"
    assert (
        MlflowClient(gqa_run.tracking_uri).get_model_version_by_alias("tiny", "sparsity-0-33").run_id == gqa_run.run_id
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(gqa_run.tracking_uri))
    downloaded = mlflow.artifacts.download_artifacts("models:/tiny/1", dst_path=str(tmp_path))
    assert torch.equal(logits(load(Path(downloaded)), ids), logits(pruned, ids))


def test_what_the_papers_ratio_gave_is_registered_by_it(
    prune_model: Callable[..., PruneResult], gqa_model: Path, tracking_uri: str
) -> None:
    settings = {"ratio": 0.25, "pruned_layers": 2, "alpha": 1.0}
    result = prune_model(gqa_model, register="by ratio", tracking_uri=tracking_uri, **settings)
    client = MlflowClient(tracking_uri)
    version = client.get_model_version_by_alias("by ratio", "ratio-0-25")
    told = {"method": "slimllm", "ratio": "0.25", "sparsity": str(round(result.totals.sparsity, 4))}
    assert told.items() <= version.tags.items()
    # Nothing was measured on held-out text.
    assert version.description == f"{gqa_model.name} pruned by {result.totals.sparsity:.1%} with slimllm"
    assert client.get_run(result.run_id).info.run_name == f"{gqa_model.name}-slimllm-ratio-0.25"


# ---- The run


def test_any_number_of_workers_gives_the_same_model(
    gqa_run: PruneResult, prune_model: Callable[..., PruneResult], gqa_model: Path
) -> None:
    expected_plan = Plan.read(gqa_run.output / "pruning" / "plan.json")
    expected = Checkpoint.open(gqa_run.output)
    for workers in (2, 5):
        output = prune_model(gqa_model, workers=workers).output
        plan, found = Plan.read(output / "pruning" / "plan.json"), Checkpoint.open(output)
        assert plan.header["params"]["num_workers"] == workers
        assert kept_sets(plan) == kept_sets(expected_plan)
        for layer in range(expected.num_layers):
            for name, tensor in expected.read_layer(layer).items():
                difference = (found.read_layer(layer)[name] - tensor).norm() / tensor.norm()
                assert difference < 1e-5, f"{workers} workers, layer {layer}, {name}"


def kept_sets(plan: Plan) -> list[tuple[int, ...] | None]:
    return [module and module.kept for layer in plan.layers for module in (layer.attention, layer.mlp)]


def test_a_checkpoint_that_was_written_wrong_is_an_error(
    prune_model: Callable[..., PruneResult],
    gqa_model: Path,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_back = finish.read_back

    def spoil(checkpoint: Checkpoint, *args: Any) -> float:
        name = "model.layers.1.mlp.down_proj.weight"
        path = checkpoint.directory / checkpoint.files[name].file
        tensors = load_file(path)
        tensors[name][0] *= -1
        save_file(tensors, path, metadata={"format": "pt"})
        return read_back(checkpoint, *args)

    monkeypatch.setattr(finish, "read_back", spoil)
    with pytest.raises(ReadBackError, match="layer 1 as written differs"):
        prune_model(gqa_model, output=str(tmp_path / "out"), run_name="spoilt", tracking_uri=tracking_uri)
    assert not list(tmp_path.iterdir())
    (run,) = mlflow_runs(tracking_uri, "spoilt")
    assert run.info.status == "FAILED"


def mlflow_runs(uri: str, name: str) -> list[Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("slimllm")
    return client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")


def test_a_tracking_server_that_is_down_costs_the_record_in_mlflow_only(untracked_run: PruneResult) -> None:
    found = (untracked_run.run_id, untracked_run.model_uri, untracked_run.tracking_uri)
    assert found == (None, None, None)
    events = Journal.read(untracked_run.output / "pruning" / "metrics.jsonl")
    assert events[-1]["status"] == "FINISHED"
