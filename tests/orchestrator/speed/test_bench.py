"""Models take turns, ratios are of the same round, and a bench leaves its tables or nothing."""

import csv
import json
from pathlib import Path

import pytest

from orchestrator import ReportConfig, report
from orchestrator.speed.bench import WARM_UP_TOKENS, BenchResult
from orchestrator.speed.config import TRANSFORMERS
from orchestrator.speed.engines import ENGINES
from orchestrator.speed.table import as_markdown
from slimllm_ops.errors import InputError
from tests.orchestrator.speed.conftest import Bench
from tests.orchestrator.speed.fake import LATER, SECONDS, FailingEngine, FakeEngine

SHAPES = ((1, 4), (1, 8), (2, 4), (2, 8))


@pytest.fixture
def faked(
    pair: tuple[Path, Path], bench_models: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[BenchResult, list[str]]:
    """A bench on engines of known times, and what they were asked."""
    (pair[0].parent / "asked").unlink(missing_ok=True)
    monkeypatch.setitem(ENGINES, TRANSFORMERS, FakeEngine)
    result = bench_models(*pair, output=str(tmp_path / "out"))
    return result, (pair[0].parent / "asked").read_text().splitlines()


def test_models_take_turns_and_ratios_are_of_the_same_round(faked: tuple[BenchResult, list[str]]) -> None:
    result, asked = faked
    warm = [f"{model} {batch} {length} {WARM_UP_TOKENS} 0" for batch, length in SHAPES for model in SECONDS]
    timed = [f"{model} {batch} {length} 3 {seed}" for seed in (0, 1) for batch, length in SHAPES for model in SECONDS]
    assert asked == warm + timed
    dense, pruned = result.figures.rows[:2]
    assert (dense.model, pruned.model, pruned.batch_size, pruned.prompt_length) == ("dense", "pruned", 1, 4)
    # The second round takes twice as long, and the ratio is the same in both.
    assert pruned.prefill_ratio == pruned.prefill_low == pruned.prefill_high == pytest.approx(2)
    assert pruned.decode_ratio == pruned.decode_low == pruned.decode_high == pytest.approx(2)
    assert pruned.first_token_seconds == pytest.approx(4 * 0.002 * 1.5)
    assert pruned.prefill_tokens_per_second == pytest.approx(1 / (0.002 * 1.5))
    assert pruned.decode_tokens_per_second == pytest.approx(1 / (0.002 * LATER * 1.5))
    assert pruned.token_p50 == pytest.approx(0.002 * LATER * 1.5)
    assert pruned.promised is not None
    assert pruned.share == pytest.approx(2 / pruned.promised)
    assert dense.share is None


def test_tables_have_what_was_measured(faked: tuple[BenchResult, list[str]]) -> None:
    result, _ = faked
    assert result.output is not None
    names = {"bench.csv", "bench.json", "bench.md", "complete.json", "metrics.jsonl"}
    assert {path.name for path in result.output.iterdir()} == names
    document = json.loads((result.output / "bench.json").read_text())
    rows = list(csv.DictReader((result.output / "bench.csv").open()))
    assert len(rows) == len(document["rows"]) == 8
    assert float(rows[1]["share"]) == document["rows"][1]["share"] == result.figures.rows[1].share
    assert [one["round"] for one in document["rounds"]] == [0] * 8 + [1] * 8
    assert document["models"][1]["parameters"] < document["models"][0]["parameters"]
    page = (result.output / "bench.md").read_text()
    assert page == as_markdown(result.figures)
    assert "| pruned | 1 x 4 | 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) |" in page


def test_a_report_shows_the_speeds(faked: tuple[BenchResult, list[str]], tmp_path: Path) -> None:
    result, page = faked[0], tmp_path / "report.html"
    assert report(ReportConfig(runs=(str(result.output),), output=str(page))).speeds == len(result.figures.rows)
    shown = page.read_text()
    for row in result.figures.rows:
        assert f"{row.prefill_tokens_per_second:,.1f}" in shown
        assert f"{row.decode_tokens_per_second:,.1f}" in shown


@pytest.fixture(scope="module")
def measured(pair: tuple[Path, Path], bench_models: Bench, tracking_uri: str) -> BenchResult:
    """A bench of real models, with widths, logged to MLflow."""
    return bench_models(*pair, batch_size=(1,), prompt_length=(8,), widths=True, tracking_uri=tracking_uri)


def test_real_models_are_measured_each_in_its_process(measured: BenchResult) -> None:
    for row in measured.figures.rows:
        assert row.prefill_tokens_per_second > 0
        assert row.token_p50 is not None
        assert row.token_p99 is not None
        assert 0 < row.token_p50 <= row.token_p99
        assert row.peak_memory > 1 << 26
    assert all(sum(one["seconds"].values()) > 0 for one in measured.figures.profiles)
    assert [(one.model, one.kind.units) for one in measured.figures.sweeps] == [
        (model, units) for model in ("dense", "pruned") for units in ("channels", "key/value heads")
    ]
    assert measured.figures.engine == "transformers on CPU, 1 threads, float32"
    assert measured.output is None


def test_each_model_is_a_child_run(measured: BenchResult, tracking_uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    parent = client.get_run(str(measured.run_id))
    assert parent.data.params["new_tokens"] == "3"
    assert parent.data.tags["mlflow.note.content"] == as_markdown(measured.figures)
    children = client.search_runs(
        [str(measured.experiment_id)], f"tags.`mlflow.parentRunId` = '{measured.run_id}'", order_by=["start_time"]
    )
    assert [run.info.run_name for run in children] == ["dense", "pruned"]
    row = measured.figures.rows[1]
    metrics = children[1].data.metrics
    assert metrics["prefill_ratio/batch_1_prompt_8"] == pytest.approx(row.prefill_ratio)
    assert metrics["parameters"] == measured.figures.models[1].parameters


def test_a_model_that_cannot_be_measured_leaves_nothing(
    pair: tuple[Path, Path], bench_models: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, TRANSFORMERS, FailingEngine)
    with pytest.raises(InputError, match=r"^dense cannot be measured: MemoryError: no room for 2 sequences$"):
        bench_models(*pair, output=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
