"""A mixture of experts from the command's config to its record, with some experts that get no calibration tokens."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from orchestrator import PruneConfig
from orchestrator.comparison.contestants import choose, exclude_unrefinable
from orchestrator.pipeline import PruneResult, calibrate, prune
from orchestrator.progress import Reporter
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan, Plan
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import family_named
from tests.orchestrator.conftest import PruneModel
from tests.tiny import save_tiny

EXPERTS, CHANNELS = 12, 48


@dataclass(frozen=True)
class Told:
    """What a run gave, and what it said."""

    result: PruneResult
    said: str

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """What was decided."""
        return Plan.read(self.result.output / "pruning" / "plan.json").layers

    def logged(self, metric: str) -> dict[int, float]:
        """Return a metric by layer."""
        lines = (self.result.output / "pruning" / "metrics.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "metrics"]
        return {event["step"]: event["metrics"][metric] for event in events if metric in event["metrics"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve experts, of which a token is sent to one."""
    settings = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size": CHANNELS}
    return save_tiny(family_named("mixtral"), tmp_path_factory.mktemp("mixture"), **settings)


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve tokens."""
    path = tmp_path_factory.mktemp("tokens") / "few.parquet"
    ids = np.random.default_rng(0).integers(0, 97, size=(2, 6))
    pq.write_table(pa.table({"input_ids": ids.tolist()}), path)
    return str(path)


@pytest.fixture(scope="module", params=["slimllm", "gram"])
def told(
    request: pytest.FixtureRequest,
    model: Path,
    few_tokens: str,
    tracking_uri: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Told:
    console = Console(file=io.StringIO())
    config = PruneConfig(
        model=str(model),
        method=request.param,
        sparsity=0.3,
        calibration=few_tokens,
        output=str(tmp_path_factory.mktemp("run") / "pruned"),
        tracking_uri=tracking_uri,
        local=True,
    )
    return Told(prune(config, Reporter(console)), console.file.getvalue())


def test_experts_without_tokens_are_told_logged_and_planned(told: Told) -> None:
    idle = {
        number: layer.mlp.idle_experts
        for number, layer in enumerate(told.layers)
        if layer.mlp and layer.mlp.idle_experts
    }
    assert idle
    first, experts = next(iter(idle.items()))
    assert f"no calibration token reached {sum(map(len, idle.values()))} of the experts" in told.said
    assert f"(layer {first}: {', '.join(map(str, experts[:8]))} ...)" in told.said
    decided = [number for number, layer in enumerate(told.layers) if layer.mlp is not None]
    assert told.logged("idle_experts") == {number: len(idle.get(number, ())) for number in decided}


def test_what_is_left_computes_numbers(told: Told) -> None:
    model = AutoModelForCausalLM.from_pretrained(told.result.output).eval()
    with torch.inference_mode():
        assert model(torch.arange(97)[None, :60]).logits.isfinite().all()
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_budget_is_met_to_within_a_channel_of_every_expert(told: Told, model: Path) -> None:
    dense, pruned = Checkpoint.open(model), Checkpoint.open(told.result.output)
    before, after = (sum(one.num_parameters(one.layer_names(layer)) for layer in range(3)) for one in (dense, pruned))
    assert 0 <= after - 0.7 * before < EXPERTS * 3 * 32


def test_units_are_the_experts_channels(told: Told) -> None:
    scores = pq.read_table(told.result.output / "pruning" / "importance.parquet").to_pandas()
    kept = told.logged("channels_kept")
    widths = Checkpoint.open(told.result.output).config.intermediate_size_per_layer
    assert kept == {layer: EXPERTS * width for layer, width in enumerate(widths)}
    for layer, rows in scores[scores["module"] == "mlp"].groupby("layer"):
        assert list(rows["unit"]) == list(range(EXPERTS * CHANNELS))
        of_each = rows["kept"].to_numpy().reshape(EXPERTS, CHANNELS).sum(axis=1)
        assert set(of_each) == {widths[layer]}
        assert np.isfinite(rows["score"]).all()


def test_moments_that_were_kept_give_the_same_model(
    model: Path, token_file: Path, prune_model: PruneModel, tmp_path: Path
) -> None:
    config = PruneConfig(
        model=str(model), method="gram", calibration=str(token_file), output=str(tmp_path / "moments"), local=True
    )
    moments = calibrate(config, Reporter(Console(file=io.StringIO())))
    once = prune_model(model, method="gram")
    again = prune_model(model, method="gram", calibration=None, moments=str(moments))
    for name in ("model-00001.safetensors", "model-00003.safetensors"):
        assert (once.output / name).read_bytes() == (again.output / name).read_bytes()


def test_what_refines_takes_no_part_and_a_note_says_so() -> None:
    notes: list[str] = []
    family = family_named("mixtral")
    names = [one.name for one in exclude_unrefinable(choose(()), (), family, notes.append)]
    assert names == [one.name for one in choose(()) if one.name != "gram-refine"]
    assert notes == [notes[0]]
    assert notes[0].startswith("gram-refine does not take part: Mixtral models cannot be refined")
    with pytest.raises(InputError, match="Mixtral models cannot be refined"):
        exclude_unrefinable(choose(("gram-refine",)), ("gram-refine",), family, notes.append)
    everything = choose(())
    assert exclude_unrefinable(everything, (), family_named("llama"), notes.append) == everything
