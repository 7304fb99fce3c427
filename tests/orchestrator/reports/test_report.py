"""`slimllm report` on the command line, and the reports that runs write themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from orchestrator import ReportConfig, report
from orchestrator.cli import main
from orchestrator.config import ConfigError
from orchestrator.pipeline import PruneResult
from tests.orchestrator.reports.conftest import WritePlan, decision, layer


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, words)])


def refused(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("slimllm: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_command_writes_what_the_run_wrote(sweep: Path, tmp_path: Path) -> None:
    for folder in (sweep, sweep / "sparsity-0.20"):
        assert run(folder, "--output", tmp_path / "page.html", "--overwrite").exit_code == 0
        assert (tmp_path / "page.html").read_bytes() == (folder / "pruning" / "report.html").read_bytes()
    assert "calibrating" in (tmp_path / "page.html").read_text()


def test_runs_with_the_same_label_are_told_apart(write_plan: WritePlan, tmp_path: Path) -> None:
    result = report(ReportConfig(runs=(str(write_plan("a")), str(write_plan("b"))), output=str(tmp_path / "page.html")))
    assert result.runs == 2
    page = result.output.read_text()
    assert "gram at 20.0% (a)" in page
    assert "gram at 20.0% (b)" in page


def test_the_result_is_told_as_json(write_plan: WritePlan, tmp_path: Path) -> None:
    told = json.loads(run(write_plan(), "--output", tmp_path / "page.html", "--json").stdout)
    assert told == {
        "output": str(tmp_path / "page.html"), "runs": 1, "comparisons": 0, "evaluations": 0, "speeds": 0
    }  # fmt: skip


def test_a_run_in_mlflow_has_the_report_and_is_reported(
    gqa_run: PruneResult, tracking_uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(tracking_uri)
    assert "pruning/report.html" in {file.path for file in client.list_artifacts(str(gqa_run.run_id), "pruning")}
    words = ("--tracking-uri", tracking_uri, "--output", tmp_path / "page.html")
    result = run(f"runs:/{gqa_run.run_id}", *words)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert page == (Path(gqa_run.output) / "pruning" / "report.html").read_text()
    assert "cannot be read" in refused("f" * 32, *words, "--overwrite")


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    words = ("--tracking-uri", f"sqlite:///{tmp_path}/none.db", "--output", tmp_path / "page.html")
    assert "is no file; pass --tracking-uri" in refused("a" * 32, *words)
    assert "tracking URI is none" in refused("a" * 32, "--tracking-uri", "none", *words[2:])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_refused(write_plan: WritePlan, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    assert "no run is named" in refused(*output)
    assert "is no directory, no file and no id" in refused(tmp_path / "gone", *output)
    assert "has no pruning/plan.json" in refused(tmp_path / "empty", *output)
    (tmp_path / "note.json").write_text("{}")
    assert "a file of another name" in refused(tmp_path / "note.json", *output)
    (tmp_path / "bench.json").write_text("{")
    assert "is not valid JSON" in refused(tmp_path / "bench.json", *output)
    broken = write_plan("broken")
    (broken / "pruning" / "plan.json").write_text('{"layers": [{}]}')
    assert "is not a plan that slimllm wrote" in refused(broken, *output)
    wild = write_plan("wild", layers=[layer(decision([7], 3), None)])
    assert "kept names units that are not there" in refused(wild, *output)
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_is_there_stays_unless_it_may_be_replaced(write_plan: WritePlan, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert "is there already" in refused(write_plan(), "--output", page)
    assert page.read_text() == "mine"
    assert "is a directory" in refused(tmp_path / "pruned", "--output", tmp_path, "--overwrite")
    assert "folder that does not exist" in refused(tmp_path / "pruned", "--output", tmp_path / "no" / "page.html")
    assert run(tmp_path / "pruned", "--output", page, "--overwrite").exit_code == 0


def test_a_text_is_not_continued_without_the_dense_model(sweep: Path, write_plan: WritePlan, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "page.html", "--continue", "Once upon a time")
    assert "the dense model models/dense cannot be read" in refused(write_plan(), *output)
    # The random model has no tokenizer.
    assert "it needs weights and a tokenizer" in refused(sweep, *output)


def test_a_run_is_needed() -> None:
    with pytest.raises(ConfigError, match="no run is named"):
        ReportConfig()


@pytest.mark.slow
def test_the_models_continue_a_text(shared: Path, prune_model: Callable[..., PruneResult], tmp_path: Path) -> None:
    model, text = shared / "models" / "babyllama-gqa", "builtin:calibration"
    small = {"samples": 4, "sequence_length": 64, "sparsity": 0.4, "method": "gram"}
    pruned = prune_model(model, calibration=text, **small)
    result = report(
        ReportConfig(runs=(str(pruned.output),), output=str(tmp_path / "page.html"), prompts=("Once upon a time",))
    )
    page = result.output.read_text()
    assert "Sample continuations" in page
    assert page.count("<b>Once upon a time</b>") == 2
