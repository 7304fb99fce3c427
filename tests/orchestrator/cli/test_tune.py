"""`slimllm tune` on the command line: on Ray, as JSON, planned, resumed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main
from tests.orchestrator.conftest import PruneModel

OPTIONS = ("--tracking-uri", "none", "--steps", "4", "--batch-size", "4", "--patience", "9")


@pytest.fixture(scope="module")
def pruned(prune_model: PruneModel, gqa_model: Path) -> Path:
    output = prune_model(gqa_model).output
    assert isinstance(output, Path)
    return output


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, words)])


@pytest.mark.usefixtures("local_ray")
def test_a_run_on_ray_says_what_came_back_and_is_not_done_twice(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (pruned, "--workers", 2, *OPTIONS, "--keep-worse", "--resume")
    first = run(*words)
    assert first.exit_code == 0, first.output
    assert "held-out loss" in first.output
    assert f"checkpoint: tuned/{pruned.name}" in first.output
    again = run(*words)
    assert again.exit_code == 0
    assert "there is nothing to resume" in again.output


def test_a_result_is_told_as_json(pruned: Path, tmp_path: Path) -> None:
    result = run(pruned, "--output", tmp_path / "out", "--local", *OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["output"] == str(tmp_path / "out")
    assert told["totals"]["steps"] == 4
    assert not told["finished_before"]


def test_a_plan_says_what_it_would_take_and_writes_nothing(pruned: Path, tmp_path: Path) -> None:
    result = run(pruned, "--output", tmp_path / "out", "--local", *OPTIONS, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [stage["name"] for stage in plan["estimate"]["stages"]] == ["start", "training"]
    assert plan["estimate"]["stages"][1]["worker"] > 0
    assert not list(tmp_path.iterdir())


def test_a_run_file_repeats_the_training(pruned: Path, tmp_path: Path) -> None:
    first = run(pruned, "--output", tmp_path / "first", "--local", *OPTIONS, "--keep-worse")
    assert first.exit_code == 0, first.output
    file = tmp_path / "first" / "pruning" / "run.toml"
    again = run("--config", file, "--output", tmp_path / "again", "--local", "--tracking-uri", "none")
    assert again.exit_code == 0, again.output
    weights = [(tmp_path / name / "model-00001.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]


def test_bad_input_ends_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path / "none", "--output", tmp_path / "out", "--local")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
