"""Files appear complete or not at all, and errors name them."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimllm_ops.errors import CheckpointError
from slimllm_ops.files import (
    NotPlainError,
    copy_file,
    open_plain,
    read_json_object,
    read_plain,
    write_json,
    written_whole,
)
from tests.conftest import files_of_at_most
from tests.no_files import NO_FILES, replaced, within


def test_a_file_takes_its_place_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with written_whole(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "new").touch()
        write_json(tmp_path / "a.json", {})
        with written_whole(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
        # A file that an earlier process left may have any mode, and be read-only.
        (tmp_path / "b.json.partial").touch(mode=0o400)
        write_json(tmp_path / "b.json", {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("new", "a.json", "a.safetensors", "b.json"), 0o666 & ~umask)


def test_a_file_system_without_modes_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").read_text() == "{}\n"


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


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    replaced(path, kind)
    with within(10), pytest.raises(CheckpointError, match=r"a.json cannot be read \(it (is|has)"):
        read_json_object(path, 1000)
    with within(10), pytest.raises(NotPlainError):
        read_plain(path, 1000)
    if kind != "terabyte":
        with within(10), pytest.raises(NotPlainError), open_plain(path):
            pass
        with within(10), pytest.raises(NotPlainError):
            copy_file(path, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_a_file_is_read_to_its_limit_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_plain(path, 5) == b"12345"
    with pytest.raises(NotPlainError, match="it has 5 bytes, and such a file needs no more than 4"):
        read_plain(path, 4)
    # A file of the system says that it has no bytes.
    with pytest.raises(NotPlainError):
        read_plain(Path("/proc/self/status"), 100)
