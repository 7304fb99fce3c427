"""Terminals that cannot print a name: commands print what they can, and end as they would elsewhere."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.cli.summary import print_summary
from orchestrator.pipeline import PruneResult
from orchestrator.progress import Reporter
from orchestrator.record import figures
from orchestrator.terminal import open_console
from tests.orchestrator.conftest import PruneModel, save_nothing


class Stream(io.TextIOWrapper):
    """A stream of an encoding, as a terminal has it."""

    def __init__(self, encoding: str, errors: str) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding, errors=errors, write_through=True)

    def told(self) -> str:
        # Click takes ASCII for a wrong setting of the terminal, and sends it UTF-8.
        return self.bytes.getvalue().decode("utf-8" if self.encoding == "ascii" else self.encoding)


def run(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, *words: str) -> tuple[int, str, str]:
    """Run a command on such a terminal; its exit code, and what it printed."""
    with monkeypatch.context() as patch:
        out, err = Stream(encoding, errors), Stream(encoding, "backslashreplace")
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            main(list(words), prog_name="slimllm")
        return int(ended.value.code or 0), out.told(), err.told()


@pytest.mark.parametrize(
    ("encoding", "errors", "shown"),
    [
        ("ascii", "strict", "mod\\xe8le-\\u6a21"),
        ("latin-1", "strict", "modèle-\\u6a21"),
    ],
)
def test_a_run_prints_what_the_terminal_can_show(
    gqa_model: Path,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
    errors: str,
    shown: str,
) -> None:
    monkeypatch.setattr(figures, "_save", save_nothing)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gqa_model, tmp_path / "modèle-模")
    shutil.copyfile(token_file, "modèle-模.parquet")
    data = ["--calibration", "modèle-模.parquet", "--evaluate", "modèle-模.parquet", "--tracking-uri", "none"]
    words = ["prune", "modèle-模", *data, "--local", "--verbose"]
    code, out, _ = run(monkeypatch, encoding, errors, *words)
    assert code == 0
    assert f"checkpoint: pruned/{shown}-0.2" in out
    assert f"perplexity, {shown}.parquet" in out
    # A taken output is refused in one line.
    code, out, err = run(monkeypatch, encoding, errors, *words[:-1], "--json")
    assert code == 2
    assert "modèle-模" in json.loads(out)["error"]
    assert err.startswith("slimllm: ")
    assert (shown if encoding != "ascii" else "modèle-模") in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["[red]x[", "[/b]", ":x:", "\\[a]", "[link=1]"])
def test_a_name_is_no_markup(name: str) -> None:
    console = open_console()
    console.file = printed = io.StringIO()
    Reporter(console).note(name)
    Reporter(console).warn(name)
    assert printed.getvalue() == f"{name}\nwarning: {name}\n"


def test_a_summary_shows_names_that_look_like_markup(
    prune_model: PruneModel, gqa_model: Path, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["[red]a.parquet", ":x:.parquet"]
    for name in names:
        shutil.copyfile(token_file, tmp_path / name)
    result: PruneResult = prune_model(gqa_model, evaluate=[str(tmp_path / name) for name in names])
    print_summary(result)
    printed = capsys.readouterr().out
    for name in names:
        assert f"perplexity, {name} " in printed
