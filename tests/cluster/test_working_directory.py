"""A job's working directory travels without Python code, and a folder that cannot travel is refused."""

import os
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.working_directory import without_code


def files_of(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.txt", "yaml.py", "sub/b.json", "sub/torch.pyc", "sub/c.so", "sub/d.so.1", "cluster/__init__.py"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "folder"


def test_all_but_the_code_travels(folder: Path) -> None:
    with without_code(folder) as made:
        assert files_of(made) == {"a.txt": "a.txt", "sub/b.json": "sub/b.json"}
    assert not made.exists()
    assert (folder / "yaml.py").exists()


def test_a_link_to_a_folder_is_followed_and_a_circle_is_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.txt").write_text("t")
    (folder / "data").symlink_to(tmp_path / "data")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nothing")
    with without_code(folder) as made:
        assert files_of(made) == {"a.txt": "a.txt", "sub/b.json": "sub/b.json", "data/t.txt": "t"}


def test_a_pipe_and_a_missing_folder_are_refused(folder: Path) -> None:
    with pytest.raises(ClusterError, match="is not there: pass a directory"), without_code(folder / "none"):
        pass
    os.mkfifo(folder / "sub" / "pipe")
    with pytest.raises(ClusterError, match="pipe is neither a file nor a folder"), without_code(folder):
        pass
