"""The size of the held-out text stands beside every perplexity, and a run without any says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main
from orchestrator.record import figures
from tests.orchestrator.conftest import save_nothing

SIZE = "64 tokens in blocks of 16"


@pytest.fixture
def run(gqa_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command on the model, in this process and without MLflow."""
    monkeypatch.setattr(figures, "_save", save_nothing)

    def invoke(command: str, *arguments: object, model: Path = gqa_model) -> Result:
        places = ["--output", tmp_path / "out", "--tracking-uri", "none", "--local", "--sparsity", "0.33"]
        asked = [command, model, *places, *arguments]
        result = CliRunner().invoke(main, [str(one) for one in asked], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result

    return invoke


def test_the_size_stands_beside_each_perplexity(
    run: Any, token_file: Path, held_out_file: Path, tmp_path: Path
) -> None:
    data = ["--calibration", token_file, "--evaluate", held_out_file, "--evaluate-tokens", "70"]
    result = run("prune", *data)
    assert SIZE in result.stdout
    assert "warning" not in result.stderr
    assert "no perplexity is measured" not in result.stderr
    assert f"| perplexity on `{held_out_file}`, {SIZE} |" in (tmp_path / "out" / "README.md").read_text()
    pruning = tmp_path / "out" / "pruning"
    totals = json.loads((pruning / "plan.json").read_text())["totals"]
    assert totals["evaluated"] == {str(held_out_file): {"tokens": 64, "block_length": 16}}
    logged: dict[str, float] = {}
    for line in (pruning / "metrics.jsonl").read_text().splitlines():
        logged |= json.loads(line).get("metrics", {})
    assert (logged["evaluated_tokens"], logged["evaluated_block_length"]) == (64, 16)
    again = run("prune", *data, "--overwrite", "--json")
    (model,) = json.loads(again.stdout)["models"]
    told = model["totals"]["perplexity"][str(held_out_file)]
    assert (told["tokens"], told["block_length"]) == (64, 16)


def test_the_size_stands_in_the_tables_of_a_sweep_and_of_a_comparison(
    run: Any, token_file: Path, held_out_file: Path, tmp_path: Path
) -> None:
    data = ["--calibration", token_file, "--evaluate", held_out_file, "--evaluate-tokens", "64"]
    swept = run("prune", *data, "--sparsity", "0.2", "--method", "gram")
    heading, *_ = (tmp_path / "out" / "pruning" / "sweep.csv").read_text().splitlines()
    assert SIZE in heading
    assert "64 tokens" in swept.stdout
    compared = run("compare", *data, "--overwrite", "--method", "magnitude")
    assert SIZE in compared.stdout
    assert f"Perplexity on {SIZE}." in (tmp_path / "out" / "comparison.md").read_text()
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert {(row["tokens"], row["block_length"]) for row in rows} == {(64, 16)}


def test_a_run_that_measures_nothing_says_so(run: Any, token_file: Path) -> None:
    said = "no perplexity is measured: to measure it, pass held-out text with --evaluate"
    assert said in run("prune", "--calibration", token_file).stderr


@pytest.mark.parametrize("command", ["prune", "calibrate"])
def test_a_model_that_is_calibrated_on_the_built_in_text_is_warned_of(
    command: str, prepared_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_save", save_nothing)
    data = ["--samples", "16", *(["--evaluate-tokens", "512", "--tracking-uri", "none"] if command == "prune" else [])]
    for more in ([], ["--dry-run"]):
        asked = [command, prepared_model, "--output", tmp_path / f"out{len(more)}", "--local", *data, *more]
        result = CliRunner().invoke(main, [str(one) for one in asked])
        assert result.exit_code == 0, result.output
        warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert len(warned) == 1, result.stderr
        assert "warning: model is calibrated on the built-in text, Python's documentation" in warned[0]


@pytest.fixture
def prepared_model(gqa_model: Path, tmp_path: Path) -> Path:
    """The model with a tokenizer of its vocabulary: 97 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0} | {chr(32 + n): n for n in range(1, 95)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    directory = tmp_path / "model"
    directory.mkdir()
    for path in gqa_model.iterdir():
        shutil.copyfile(path, directory / path.name)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    return directory
