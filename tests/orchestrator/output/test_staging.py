"""The output directory is complete or absent; beside it lies only what `--resume` needs."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.completion import MARK
from orchestrator.config import ConfigError
from orchestrator.output.staging import is_finished, open_staging
from slimllm_ops.errors import NonFiniteError, ReadBackError
from tests.forked_workers.server import FORKED

ASKED: dict[str, Any] = {"sparsity": (0.2,), "model_digest": "abc"}
# Begins an output, solves something, and is killed.
KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.output.staging import open_staging

with open_staging(Path(sys.argv[1]), False, {"sparsity": (0.2,), "model_digest": "abc"}) as staging:
    if sys.argv[2] == "solved":
        (staging.solved / "layer").write_text("seven")
    (staging.directory / "half").touch()
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    with open_staging(output, overwrite=False) as staging:
        (staging.directory / "file").write_text("whole")
        assert not output.exists()
    assert (output / "file").read_text() == "whole"
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), open_staging(tmp_path / "a" / "b" / "out", overwrite=False) as staging:  # noqa: PT012
        (staging.directory / "file").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_parent_that_others_write_to_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_staging(tmp_path / "a" / "out", overwrite=False):  # noqa: PT012
        (tmp_path / "a" / "others").touch()
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "others"]


def test_an_output_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"), open_staging(output, overwrite=False):
        pass
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_overwriting_replaces_all_of_it_but_only_by_something_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(RuntimeError), open_staging(output, overwrite=True):
        raise RuntimeError
    assert [path.name for path in output.iterdir()] == ["old"]
    with open_staging(output, overwrite=True) as staging:
        (staging.directory / "new").touch()
    assert sorted(path.name for path in output.iterdir()) == [MARK, "new"]
    assert list(tmp_path.iterdir()) == [output]


def test_an_empty_directory_is_taken_also_where_one_stands_in_it(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    before = Path.cwd()
    os.chdir(inside)
    try:
        with open_staging(Path(), overwrite=False) as staging:
            (staging.directory / "file").touch()
    finally:
        os.chdir(before)
    assert sorted(path.name for path in inside.iterdir()) == [MARK, "file"]


@pytest.mark.parametrize("place", ["file/out", "file"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another --output"), open_staging(tmp_path / place, overwrite=True):
        pass


def test_a_place_in_a_read_only_file_system_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be written"), open_staging(Path("/proc/a/b"), overwrite=False):
        pass


# ---- Runs that end early


def begun(output: Path, solved: str) -> tuple["subprocess.Popen[str]", int]:
    """Start a process that begins an output and waits to be told to end; return it, and the id of who holds it."""
    arguments = [sys.executable, "-c", KILLED, str(output), solved]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(arguments, env=os.environ | FORKED, text=True, **pipes)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: "subprocess.Popen[str]") -> None:
    """Let it kill itself."""
    process.communicate("\n")
    assert process.returncode == -signal.SIGKILL


def partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """An output whose run was killed when something was solved."""
    output = tmp_path / "out"
    end(begun(output, "solved")[0])
    assert not output.exists()
    return output


def test_what_is_solved_waits_for_whoever_asks_the_same(killed: Path) -> None:
    with open_staging(killed, False, ASKED, resume=True) as staging:
        assert staging.resumed
        assert (staging.solved / "layer").read_text() == "seven"
        assert (staging.directory / "half").exists()
    assert {path.name for path in killed.iterdir()} == {"half", "pruning", MARK}
    assert list(killed.parent.iterdir()) == [killed]


def test_an_error_keeps_what_is_solved_and_says_how_to_go_on(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as raised, open_staging(output, False, ASKED) as staging:  # noqa: PT012
        (staging.solved / "layer").touch()
        raise KeyboardInterrupt
    assert "--resume" in raised.value.__notes__[0]
    assert str(partial_of(output)) in raised.value.__notes__[0]
    assert list(tmp_path.iterdir()) == [partial_of(output)]


@pytest.mark.parametrize("error", [NonFiniteError("layer 3 holds NaN"), ReadBackError("layer 3 differs")])
def test_what_could_not_go_on_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), open_staging(tmp_path / "out", False, ASKED) as staging:  # noqa: PT012
        (staging.solved / "layer").touch()
        raise error
    assert not list(tmp_path.iterdir())


def test_what_is_solved_is_neither_forgotten_nor_overwritten_unasked(killed: Path) -> None:
    with pytest.raises(ConfigError, match=r"not finished.*--resume.*--overwrite"), open_staging(killed, False, ASKED):
        pass
    assert (partial_of(killed) / ".work/solved/layer").exists()
    with open_staging(killed, True, ASKED) as staging:
        assert not staging.resumed
        assert sorted(path.name for path in staging.directory.iterdir()) == [".work", "pruning"]
        assert not list(staging.solved.iterdir())


def test_a_run_that_solved_nothing_is_begun_anew(tmp_path: Path) -> None:
    output = tmp_path / "out"
    end(begun(output, "nothing")[0])
    with open_staging(output, False, ASKED) as staging:
        assert not (staging.directory / "half").exists()
    assert list(tmp_path.iterdir()) == [output]


def test_a_resume_that_asks_something_else_is_refused(killed: Path) -> None:
    other = ASKED | {"sparsity": (0.3,), "model_digest": "abd"}
    with (
        pytest.raises(ConfigError, match=r"model_digest abc there, abd here, sparsity \[0.2\] there, \(?\[?0.3"),
        open_staging(killed, False, other, resume=True),
    ):
        pass
    assert (partial_of(killed) / ".work/solved/layer").exists()


def test_with_nothing_to_resume_a_run_begins(tmp_path: Path) -> None:
    with open_staging(tmp_path / "out", False, ASKED, resume=True) as staging:
        assert not staging.resumed
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_finished_output_knows_what_it_was_asked_to_be(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert not is_finished(output, ASKED)
    with open_staging(output, False, ASKED):
        pass
    # As a run leaves it that is killed just before its last step.
    (output / ".work").mkdir()
    (output / ".work" / "holder").touch()
    assert is_finished(output, ASKED)
    assert sorted(path.name for path in output.iterdir()) == [MARK, "pruning"]
    with pytest.raises(ConfigError, match="sparsity"):
        is_finished(output, ASKED | {"sparsity": (0.3,)})


def test_a_run_that_overwrites_is_resumed_beside_what_it_is_to_replace(tmp_path: Path) -> None:
    output, other = tmp_path / "out", ASKED | {"sparsity": (0.3,)}
    with open_staging(output, False, other) as staging:
        (staging.directory / "old").touch()
    with pytest.raises(KeyboardInterrupt), open_staging(output, True, ASKED) as staging:  # noqa: PT012
        (staging.solved / "layer").touch()
        raise KeyboardInterrupt
    assert not is_finished(output, ASKED)
    with open_staging(output, True, ASKED, resume=True) as staging:
        assert staging.resumed
    assert is_finished(output, ASKED)
    assert sorted(path.name for path in output.iterdir()) == [MARK, "pruning"]


@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_run_is_refused_with_who_holds_the_output(tmp_path: Path, settings: dict[str, bool]) -> None:
    output = tmp_path / "out"
    first, holder = begun(output, "solved")
    with (
        pytest.raises(ConfigError, match=rf"another run \(process {holder} on "),
        open_staging(output, **{"overwrite": False, "asked": ASKED} | settings),
    ):
        pass
    assert (partial_of(output) / "half").exists()
    end(first)
    with open_staging(output, False, ASKED, resume=True) as staging:
        assert staging.resumed


def test_a_value_is_computed_once_whatever_becomes_of_the_process(tmp_path: Path) -> None:
    computed = []

    def compute() -> list[float]:
        computed.append(1)
        return [1 / 3, 2.0]

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), open_staging(tmp_path / "out", False, ASKED, resume=True) as staging:  # noqa: PT012
            assert staging.results.once("values", compute) == [1 / 3, 2.0]
            raise KeyboardInterrupt
    assert len(computed) == 1
