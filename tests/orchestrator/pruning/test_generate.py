"""The dense model samples calibration sequences, alone or beside a text."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from actors import batching, group
from actors.errors import WorkerLostError
from orchestrator import PruneConfig
from orchestrator.comparison.compare import compare
from orchestrator.config import CompareConfig, ConfigError
from orchestrator.data import DataError
from orchestrator.inputs import load_inputs
from orchestrator.pipeline import PruneResult, calibrate, prune
from orchestrator.preflight.dry_run import plan_pruning
from orchestrator.progress import Reporter
from orchestrator.record import figures
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import InputError
from slimllm_ops.stream.footprint import Footprint
from slimllm_ops.stream.generation import GenerationStream
from tests.conftest import content
from tests.orchestrator.conftest import save_nothing

PruneModel = Callable[..., PruneResult]
SELF = {"calibration": "self:10", "sequence_length": 24, "method": "gram"}


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Sample three sequences at once, so that ten give several workers something to do; draw no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "SEQUENCES_AT_ONCE", 3)
        patch.setattr(figures, "_save", save_nothing)
        yield


def plan_of(result: PruneResult) -> dict[str, Any]:
    return json.loads((Path(result.output) / "pruning" / "plan.json").read_text())["params"]


@pytest.fixture(scope="module")
def alone(prune_model: PruneModel, gqa_model: Path) -> PruneResult:
    return prune_model(gqa_model, **SELF)


def test_a_model_and_a_sparsity_are_enough(alone: PruneResult) -> None:
    assert alone.totals.calibration_tokens == 10 * 24
    assert plan_of(alone)["calibration"] == "self:10"
    card = (Path(alone.output) / "README.md").read_text()
    assert "Calibrated on 240 tokens of `self:10`, 10 of 10 sequences sampled by the model itself" in card
    assert 'calibration = "self:10"' in (Path(alone.output) / "pruning" / "run.toml").read_text()


@pytest.mark.parametrize("workers", [2, 3, 6])
def test_any_number_of_workers_samples_the_same_sequences(
    prune_model: PruneModel, gqa_model: Path, alone: PruneResult, workers: int
) -> None:
    shared = prune_model(gqa_model, workers=workers, **SELF)
    assert plan_of(shared)["calibration_digest"] == plan_of(alone)["calibration_digest"]


def test_workers_on_ray_sample_them_too(prune_on_ray: PruneModel, cpus_of_ray: None, gqa_model: Path) -> None:
    on_ray, here = (prune_on_ray(gqa_model, workers=2, local=local, **SELF) for local in (False, True))
    assert plan_of(on_ray)["calibration_digest"] == plan_of(here)["calibration_digest"]


@pytest.mark.parametrize("method", ["slimllm", "gram"])
def test_sequences_are_added_to_a_text(
    prune_model: PruneModel, gqa_model: Path, token_blocks: np.ndarray, method: str
) -> None:
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.pipeline.log_inputs", lambda run, params, inputs: seen.append(inputs))
        result = prune_model(gqa_model, method=method, generate=4)
    ids_BT, (number, length) = seen[0].calibration_blocks(), token_blocks.shape
    assert ids_BT.shape == (number + 4, length)
    assert np.array_equal(ids_BT[:number], token_blocks)
    # Each begins with tokens of the text.
    text = [row.tolist() for row in token_blocks]
    for row in ids_BT[number:].tolist():
        assert any(row[: length - 1] == other[: length - 1] for other in text)
    assert result.totals.calibration_tokens == (number + 4) * length
    assert f"4 of {number + 4} sequences sampled" in (Path(result.output) / "README.md").read_text()


def config_of(output: Path, model: Path, **settings: Any) -> PruneConfig:
    places = {"output": str(output), "local": True, "tracking_uri": "none", "workers": 2}
    return PruneConfig(**{"model": str(model), **places, **SELF, **settings})


def reporter() -> Reporter:
    return Reporter(Console(file=io.StringIO(), width=400))


@pytest.fixture(scope="module")
def undisturbed(gqa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a run to which nothing happens."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    prune(config_of(output, gqa_model), reporter())
    return content(output)


def raise_at_batch(number: int, error: BaseException, patch: pytest.MonkeyPatch) -> list[GenerationStream]:
    """Raise an error in place of sampling a batch; return the list of all calls, which grows."""
    generate_next, calls = GenerationStream.generate_next, list[GenerationStream]()

    def failing(stream: GenerationStream) -> np.ndarray:
        calls.append(stream)
        if len(calls) == number:
            raise error
        return generate_next(stream)

    patch.setattr(GenerationStream, "generate_next", failing)
    return calls


def test_a_run_that_ends_early_keeps_its_sequences(
    gqa_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_next = GenerationStream.generate_next
    with monkeypatch.context() as patch:
        raise_at_batch(3, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt) as raised:
            prune(config_of(tmp_path / "cut", gqa_model), reporter())
    assert "--resume" in raised.value.__notes__[0]
    rows: list[int] = []

    def counted(stream: GenerationStream) -> np.ndarray:
        found = generate_next(stream)
        rows.append(len(found))
        return found

    monkeypatch.setattr(GenerationStream, "generate_next", counted)
    prune(config_of(tmp_path / "cut", gqa_model, resume=True), reporter())
    # Two batches of three were saved.
    assert sum(rows) == 4
    assert content(tmp_path / "cut") == undisturbed
    with pytest.raises(ConfigError, match="seed 0 there, 1 here"):
        prune(config_of(tmp_path / "cut", gqa_model, resume=True, seed=1), reporter())


def test_a_lost_worker_costs_its_batch_only(
    gqa_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = raise_at_batch(4, WorkerLostError("a worker died."), monkeypatch)
    prune(config_of(tmp_path / "lost", gqa_model), reporter())
    assert len(calls) > 4
    assert content(tmp_path / "lost") == undisturbed


def test_kept_moments_keep_the_sequences_for_a_refinement(gqa_model: Path, held_out_file: Path, tmp_path: Path) -> None:
    direct = prune(config_of(tmp_path / "direct", gqa_model, refine=True), reporter())
    moments = calibrate(config_of(tmp_path / "moments", gqa_model), reporter())
    assert (tmp_path / "moments" / "generated.arrow").exists()
    settings = {"moments": str(moments), "calibration": None, "refine": True}
    later = prune(config_of(tmp_path / "later", gqa_model, **settings), reporter())
    weights = [sorted(Path(one.output).glob("*.safetensors")) for one in (direct, later)]
    assert [one.read_bytes() for one in weights[0]] == [one.read_bytes() for one in weights[1]] != []
    with pytest.raises(InputError, match=r"are of blocks of 24 tokens, .* has 16: pass the same --calibration"):
        load_inputs(config_of(tmp_path / "other", gqa_model, **settings | {"calibration": str(held_out_file)}), print)
    with pytest.raises(
        InputError, match=r"are of 10 sequences that the model sampled, self:9 asks for 9: pass the same"
    ):
        load_inputs(config_of(tmp_path / "other", gqa_model, **settings | {"calibration": "self:9"}), print)


def test_methods_are_compared_on_the_same_sequences(gqa_model: Path, held_out_file: Path, tmp_path: Path) -> None:
    config = CompareConfig(
        **{name: SELF[name] for name in ("calibration", "sequence_length")},
        model=str(gqa_model),
        methods=("gram",),
        evaluate=(str(held_out_file),),
        output=str(tmp_path / "out"),
        local=True,
        tracking_uri="none",
    )
    assert len(compare(config, reporter()).rows) == 3
    assert "Calibration: self:10, 240 tokens" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"calibration": "self:none"}, DataError, "self:none is to name how many sequences"),
        ({"evaluate": ("self:4",)}, DataError, "--evaluate self:4: perplexity needs text that the model did not write"),
        ({"generate": 4}, ConfigError, "calibration self:10 is sampled by the model already"),
        ({"calibration": None, "moments": "m", "generate": 4}, ConfigError, "pass generate to calibrate instead"),
        ({"calibration": None, "generate": -1}, ConfigError, "generate"),
    ],
)
def test_what_cannot_be_sampled_is_refused_beforehand(
    gqa_model: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        load_inputs(config_of(tmp_path / "out", gqa_model, **settings), print)


def test_the_estimate_has_the_stage(gqa_model: Path, tmp_path: Path) -> None:
    plan = plan_pruning(config_of(tmp_path / "out", gqa_model), reporter())
    assert plan is not None
    first = plan.estimate.stages[1]
    assert first.name == "generating"
    assert first.worker > first.required > 0


def test_a_model_that_memory_does_not_hold_is_read_layer_by_layer(
    gqa_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_layer = Footprint.of_generation(Checkpoint.open(gqa_model), torch.device("cpu"), keep_layers=False).layers

    def fitting(footprint: Footprint, length: int, free: int) -> int:
        return 3 if footprint.layers <= one_layer else 0

    monkeypatch.setattr(batching, "sequences_that_fit", fitting)
    monkeypatch.setattr(group, "sequences_that_fit", fitting)
    told = io.StringIO()
    prune(config_of(tmp_path / "read", gqa_model), Reporter(Console(file=told, width=400)))
    assert "every token reads it from the disk" in told.getvalue()
    assert content(tmp_path / "read") == undisturbed


def test_a_sequence_that_memory_does_not_hold_is_refused(gqa_model: Path) -> None:
    whole, by_layer = (
        Footprint.of_generation(Checkpoint.open(gqa_model), torch.device("cpu"), keep_layers=keep)
        for keep in (True, False)
    )
    needed = by_layer.fixed + by_layer.activations_per_token * 50
    assert batching.sequences_at_once(whole, by_layer, 50, needed) == 1
    with pytest.raises(InputError, match=r"^to sample a sequence of 50 tokens, each worker needs 0.0 GB.* lower --seq"):
        batching.sequences_at_once(whole, by_layer, 50, needed - 1)
