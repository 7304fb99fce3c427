"""The output directory: whole or not there at all, and nothing beside it."""

import os
from pathlib import Path

import pytest

from orchestrator.config import ConfigError
from orchestrator.output import staged


def test_it_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    with staged(output, overwrite=False) as staging:
        (staging / "file").write_text("whole")
        assert not output.exists()
    assert (output / "file").read_text() == "whole"
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "a" / "b" / "out", overwrite=False) as staging:  # noqa: PT012
        (staging / "file").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_parent_that_others_write_to_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "out", overwrite=False):  # noqa: PT012
        (tmp_path / "a" / "others").touch()
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "others"]


def test_an_output_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"), staged(output, overwrite=False):
        pass
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_overwriting_replaces_all_of_it_but_only_by_something_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(RuntimeError), staged(output, overwrite=True):
        raise RuntimeError
    assert [path.name for path in output.iterdir()] == ["old"]
    with staged(output, overwrite=True) as staging:
        (staging / "new").touch()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]


def test_an_empty_directory_is_taken_also_where_one_stands_in_it(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    before = Path.cwd()
    os.chdir(inside)
    try:
        with staged(Path(), overwrite=False) as staging:
            (staging / "file").touch()
    finally:
        os.chdir(before)
    assert [path.name for path in inside.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["file/out", "file"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another --output"), staged(tmp_path / place, overwrite=True):
        pass


def test_a_place_in_a_read_only_file_system_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be written"), staged(Path("/proc/a/b"), overwrite=False):
        pass
