"""Every command in the README runs as written, on a tiny model and with less text."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator import builtin
from orchestrator.builtin import MODEL_DIR, calibration_text, heldout_text
from orchestrator.cli import main
from orchestrator.cli.options import flag_of, groups_of
from orchestrator.cli.options_table import COMMANDS
from tests.elsewhere import Elsewhere

README = Path(__file__).parents[1] / "README.md"
SMALL = ["--samples", "4", "--sequence-length", "64", "--local"]
# A model of next to nothing, with the built-in one's tokenizer.
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
# Commands that pass text through a model, and those that take what an earlier line of the page has pruned.
PASSES = ("prune", "calibrate", "compare")
FOLLOWS = {"export": " --output pruned/uniform"} | dict.fromkeys(
    ("log", "tune", "evaluate", "bench", "report"), " prune path/to/model"
)
FEW_STEPS = ["--steps", "2", "--batch-size", "2", "--sequence-length", "64", "--local"]
LITTLE = ["--batch-size", "1", "--prompt-length", "16", "--new-tokens", "2", "--rounds", "1"]


def shell_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def slimllm_commands() -> list[str]:
    return [line for line in shell_lines() if line.startswith(".venv/bin/slimllm ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path]) -> Path:
    """A folder with the files that the README's examples name."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [json.dumps({"text": text}) for text in calibration_text()[:20]]
    (folder / "text.jsonl").write_text("\n".join(rows))
    (folder / "heldout.txt").write_text("\n\n".join(heldout_text()[:5]))
    settings = json.loads((MODEL_DIR / "config.json").read_text())
    named = {name: settings[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "path" / "to").mkdir(parents=True)
    shutil.copytree(make_llama(num_key_value_heads=2, **named, **TINY), folder / "path" / "to" / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODEL_DIR / name, folder / "path" / "to" / "model")
    return folder


@pytest.fixture(autouse=True)
def less_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure perplexities on a few documents of the built-in text."""
    few = heldout_text()[:5]
    monkeypatch.setattr(builtin, "heldout_text", lambda: few)


def run_in(folder: Path, line: str, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    words = ["path/to/model" if word == "MODEL" else word for word in shlex.split(line)[1:]]
    if words[0] in FOLLOWS and not all(Path(word).exists() for word in words[1:] if word.startswith("pruned/")):
        earlier = next(one for one in slimllm_commands() if FOLLOWS[words[0]] in one)
        run_in(folder, earlier, tracking_uri, monkeypatch)
    if words[0] == "log":
        # The example's server is nobody's.
        words = [*words[:-1], tracking_uri]
    if words[0] in PASSES:
        words += SMALL
    if words[0] == "evaluate":
        words += ["--tokens", "512", "--local"]
    if words[0] == "tune":
        words += FEW_STEPS
    if words[0] == "bench":
        words += LITTLE
    if words[0] == "compare" and "--method" not in words:
        # test_comparison.py compares all methods.
        words += ["--method", "flap"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("line", slimllm_commands())
def test_every_slimllm_command_runs(
    line: str, workplace: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in(workplace, line, tracking_uri, monkeypatch)


def test_the_python_example_runs(
    workplace: Path,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL) if "prune(" in block
    )
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    small = "samples=4, sequence_length=64, local=True, overwrite=True, "
    exec(example.replace("PruneConfig(model", f"PruneConfig({small}model"), {})
    assert "builtin:heldout" in capsys.readouterr().out


def test_the_example_on_a_models_card_runs_where_the_package_is_not_and_asks_nothing(
    workplace: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch, elsewhere: Elsewhere
) -> None:
    pruned = workplace / "pruned" / "model-0.2"
    if not pruned.exists():
        line = next(one for one in slimllm_commands() if FOLLOWS["log"] in one)
        run_in(workplace, line, tracking_uri, monkeypatch)
    (example,) = re.findall(r"```python\n(.*?)```", (pruned / "README.md").read_text(), flags=re.DOTALL)
    ended = elsewhere.run(example.replace("<this directory>", str(pruned)), workplace)
    assert ended.code == 0, ended.stderr
    assert "[y/N]" not in ended.stdout + ended.stderr


def test_the_table_of_options_has_every_option() -> None:
    table = (README.parent / "docs" / "options.md").read_text()
    flags = [flag_of(command, name) for command in COMMANDS for group in groups_of(command).values() for name in group]
    missing = [flag for flag in flags if f"{flag} " not in table and f"{flag}`" not in table]
    assert not missing


def test_the_make_targets_are_there_and_ci_runs_them() -> None:
    makefile, ci = (README.parent / "Makefile").read_text(), (README.parent / ".ci" / "run").read_text()
    for line in shell_lines():
        if line.startswith("make "):
            assert f"\n{line.removeprefix('make ')}:" in makefile
            assert line in ci
