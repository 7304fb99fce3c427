"""`slimllm bench` on the command line: tables, JSON, bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main

LITTLE = ("--batch-size", 1, "--prompt-length", 8, "--new-tokens", 2, "--rounds", 1, "--threads", 1)
WITHOUT_MLFLOW = """
import sys
from orchestrator.cli import main
main(sys.argv[1:], standalone_mode=False)
assert "mlflow" not in sys.modules
"""


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, words)])


@pytest.fixture(scope="module")
def other(gqa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(gqa_model, folder)
    return folder


def test_a_result_is_told_as_tables_and_imports_no_mlflow(gqa_model: Path, other: Path, tmp_path: Path) -> None:
    words = ["bench", gqa_model, other, *LITTLE, "--tracking-uri", "none", "--output", tmp_path / "out"]
    command = [sys.executable, "-c", WITHOUT_MLFLOW, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    for told in ("Size", "Speed", f"Ratios to {gqa_model.name}", "Where the time of a prompt goes", "slimllm log"):
        assert told in done.stdout
    assert f"tables: {tmp_path / 'out'}" in done.stdout


def test_a_result_is_told_as_json(gqa_model: Path) -> None:
    result = run(gqa_model, *LITTLE, "--tracking-uri", "none", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["rows"][0]["model"] == gqa_model.name
    assert told["output"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no model is named"),
        (["none"], "does not exist: pass a directory or a hub id"),
        (["MODEL", "--prompt-length", 100], "takes 64 at most: pass a shorter --prompt-length"),
        (["MODEL", "--engine", "vllm", "--widths"], "leave widths out"),
        (["MODEL", "--output", "TAKEN"], "is not empty: choose another --output, or pass --overwrite"),
    ],
)
def test_bad_input_ends_in_one_line(gqa_model: Path, tmp_path: Path, words: list[object], said: str) -> None:
    (tmp_path / "file").touch()
    named = {"MODEL": gqa_model, "TAKEN": tmp_path}
    result = run(*(named.get(str(word), word) for word in words), "--tracking-uri", "none")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
