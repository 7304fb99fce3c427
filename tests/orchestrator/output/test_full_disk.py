"""A disk that is full at any moment of a run ends it with the name of a file; the run resumes once there is room."""

import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from tests.conftest import content, files_of_at_most
from tests.full_disk import FullDisk

MOMENTS = 18
# Changes of the disk in such a run, at least; the output is in its place with the last of them.
CHANGES = 70
# Bytes of the largest file that is taken; the weights of the model have more.
SIZES = (0, 60, 700, 3000, 25_000)


pytestmark = pytest.mark.usefixtures("figures_are_not_rendered")


@pytest.fixture(scope="module")
def disk(folder: Path) -> FullDisk:
    return FullDisk(folder)


@pytest.fixture(scope="module")
def command(gqa_model: Path, token_file: Path) -> Callable[..., tuple[int, list[str]]]:
    """Prune into an output; the exit code, and the lines of the error."""

    def prune(output: Path, *more: str) -> tuple[int, list[str]]:
        words = ["prune", gqa_model, "--calibration", token_file, "--method", "gram", "--local", "--output", output]
        done = CliRunner().invoke(main, [*map(str, words), "--tracking-uri", "none", *more])
        assert isinstance(done.exception, SystemExit | None), done.exception
        return done.exit_code, [line for line in done.stderr.splitlines() if line.startswith("slimllm: ")]

    return prune


@pytest.fixture(scope="module")
def undisturbed(command: Callable[..., tuple[int, list[str]]], folder: Path, disk: FullDisk) -> dict[str, bytes]:
    """What a run writes that finds room, and in how many changes of the disk."""
    with disk.full_at(sys.maxsize):
        assert command(folder / "undisturbed") == (0, [])
    return content(folder / "undisturbed")


def require_one_line_and_a_resumed_run(
    command: Callable[..., tuple[int, list[str]]],
    output: Path,
    full: AbstractContextManager[None],
    expected: dict[str, bytes],
) -> None:
    with full:
        code, lines = command(output)
    assert (code, len(lines)) in ((1, 1), (2, 1)), lines
    assert str(output.parent) in lines[0]
    assert not output.exists()
    staging = output.with_name(f".{output.name}.partial")
    assert staging.exists() == ("--resume" in lines[0]), "what is kept is told"
    assert command(output, "--resume") == (0, [])
    assert content(output) == expected


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.slow] * (part % 3 != 0)) for part in range(MOMENTS)]
)
def test_a_disk_that_is_full_from_a_moment_on(
    command: Callable[..., tuple[int, list[str]]],
    disk: FullDisk,
    undisturbed: dict[str, bytes],
    folder: Path,
    part: int,
) -> None:
    moment = 1 + int((part + random.Random(part).random()) * CHANGES / MOMENTS)
    require_one_line_and_a_resumed_run(command, folder / str(part), disk.full_at(moment), undisturbed)


@pytest.mark.parametrize("size", [pytest.param(one, marks=[pytest.mark.slow] * (one in (0, 700))) for one in SIZES])
def test_a_disk_that_takes_no_more_bytes(
    command: Callable[..., tuple[int, list[str]]], undisturbed: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    require_one_line_and_a_resumed_run(command, tmp_path / "out", files_of_at_most(size), undisturbed)
