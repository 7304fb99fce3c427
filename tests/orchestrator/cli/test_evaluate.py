"""`slimllm evaluate` on the command line: tables, JSON, and one line for bad input."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def test_tables_are_shown_and_a_run_file_repeats_them(gqa_model: Path, token_file: Path, tmp_path: Path) -> None:
    here = ("--local", "--tracking-uri", "none")
    first = run(gqa_model, "--data", token_file, *here, "--output", tmp_path / "first")
    assert first.exit_code == 0, first.output
    assert "perplexity" in first.output
    assert f"tables: {tmp_path / 'first'}" in first.output.replace("\n", "")
    again = run("--config", tmp_path / "first" / "run.toml", *here, "--output", tmp_path / "again", "--json")
    assert again.exit_code == 0, again.output
    (model,) = json.loads(again.stdout)["models"]
    (written,) = json.loads((tmp_path / "first" / "evaluation.json").read_text())["models"]
    assert model["texts"][0]["loss"] == written["perplexity"][0]["loss"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no model is named: pass one or more, the one to compare with first"),
        (["a", "a"], "a model was given twice: give each once"),
        (
            ["a", "--stride", "9", "--length", "8"],
            "stride is 9, so windows of 8 tokens leave tokens out: give at most 8",
        ),
        (["a", "--limit", "5"], "limit is for tasks, and none is named: pass tasks"),
        (
            ["a", "--tasks", "x", "--task-folder", "/nowhere"],
            "task_folder /nowhere is not a folder: pass one that holds",
        ),
        (["/nowhere/a"], "model directory /nowhere/a does not exist: pass a directory or a hub id"),
        (["a", "--output", "s3://b/c"], "output s3://b/c is a URI, but an evaluation needs a directory: pass one"),
    ],
)
def test_bad_input_ends_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words, "--tracking-uri", "none", "--local")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"slimllm: {said}")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
