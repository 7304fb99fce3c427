"""Programs run in forks of one process, and cannot import this project where tests rely on that."""

from pathlib import Path

import pytest

from tests.elsewhere import Elsewhere


@pytest.mark.parametrize("package", ["slimllm_ops", "orchestrator.config", "actors", "cluster"])
def test_nothing_of_this_project_can_be_imported(elsewhere: Elsewhere, tmp_path: Path, package: str) -> None:
    ended = elsewhere.run(f"import {package}", tmp_path)
    assert (ended.code, ended.stderr.splitlines()[-1]) == (1, f"ModuleNotFoundError: {package.partition('.')[0]}")


def test_a_program_has_its_folder_and_variables_and_leaves_nothing(elsewhere: Elsewhere, tmp_path: Path) -> None:
    ended = elsewhere.run("import os; kept = os.environ['WORD']; print(os.getcwd(), kept)", tmp_path, WORD="word")
    assert (ended.code, ended.stdout, ended.stderr) == (0, f"{tmp_path} word\n", "")
    ended = elsewhere.run("import os; print('WORD' in os.environ); print(kept)", tmp_path)
    assert (ended.code, ended.stdout, ended.stderr.splitlines()[-1][:9]) == (1, "False\n", "NameError")


def test_a_program_exits_as_it_says_and_has_nobody_to_ask(elsewhere: Elsewhere, tmp_path: Path) -> None:
    assert [elsewhere.run(f"raise SystemExit({code!r})", tmp_path).code for code in (None, 0, 7, "no")] == [0, 0, 7, 1]
    ended = elsewhere.run("input('run the code? [y/N] ')", tmp_path)
    assert (ended.code, ended.stdout) == (1, "run the code? [y/N] ")
    assert ended.stderr.endswith("EOFError: EOF when reading a line\n")


def test_a_program_that_waits_without_end_is_killed(elsewhere: Elsewhere, tmp_path: Path) -> None:
    assert elsewhere.run("import time; time.sleep(100)", tmp_path, seconds=1).code < 0
