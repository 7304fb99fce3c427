"""Files appear complete or not at all, and errors name them."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimllm_ops.files import write_json, written_whole
from tests.conftest import files_of_at_most


def test_a_file_takes_its_place_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with written_whole(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_what_was_there_is_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(error), written_whole(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_is_an_error_of_the_system_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with files_of_at_most(1000), pytest.raises(OSError) as raised, written_whole(path) as partial:  # noqa: PT011
        save_file({"a": torch.zeros(1000)}, partial)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(path)
    assert not list(tmp_path.iterdir())
    with files_of_at_most(10), pytest.raises(OSError):  # noqa: PT011
        write_json(tmp_path / "a.json", list(range(100)))
    assert not list(tmp_path.iterdir())
