"""An output that is a link or a mount point stays one, and what no run made is refused, not deleted."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config import ConfigError
from orchestrator.output.place import is_mount, staging_place
from orchestrator.output.staging import open_staging, require_can_start

ASKED = {"sparsity": 0.2}
# Mounts a file system, and makes an output where it is, twice.
MOUNTED = """
import os, subprocess, sys
from pathlib import Path
from orchestrator.output.staging import is_finished, open_staging

output = Path(sys.argv[1])
subprocess.run(["mount", *sys.argv[2].split(), str(output)], check=True)
device, inode = os.stat(output).st_dev, os.stat(output).st_ino
for sparsity in (0.2, 0.3):
    with open_staging(output, sparsity == 0.3, {"sparsity": sparsity}) as staging:
        (staging.directory / "weights").write_text(str(sparsity))
    assert is_finished(output, {"sparsity": sparsity})
    assert (os.stat(output).st_dev, os.stat(output).st_ino) == (device, inode)
    assert sorted(os.listdir(output)) == ["complete.json", "pruning", "weights"], os.listdir(output)
    assert (output / "weights").read_text() == str(sparsity)
"""


def make(output: Path) -> None:
    with open_staging(output, True, ASKED) as staging:
        (staging.directory / "weights").touch()


def can_mount() -> bool:
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this user may not mount")
@pytest.mark.parametrize("what", ["-t tmpfs none", "--bind {}"])
def test_an_output_that_is_a_mount_point_is_filled(tmp_path: Path, what: str) -> None:
    (tmp_path / "out put").mkdir()
    (tmp_path / "volume").mkdir()
    mounted = what.format(tmp_path / "volume")
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", MOUNTED]
    done = subprocess.run([*command, str(tmp_path / "out put"), mounted], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out put", "volume"]


def test_a_mount_point_is_told_from_a_directory(tmp_path: Path) -> None:
    assert is_mount(Path("/proc"))
    assert not is_mount(tmp_path)
    assert not is_mount(tmp_path / "missing")


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_stays_one(tmp_path: Path, there: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        make(disk / "model")
    (tmp_path / "out").symlink_to(disk / "model")
    make(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (disk / "model" / "weights").exists()
    assert [path.name for path in disk.iterdir()] == ["model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_link_that_leads_nowhere_and_the_root_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    for output in (tmp_path / "out", Path("/")):
        with pytest.raises(ConfigError, match="choose another --output"):
            make(output)


def a_link(staging: Path) -> None:
    (staging.parent / "elsewhere").mkdir()
    staging.symlink_to(staging.parent / "elsewhere")


def a_file(staging: Path) -> None:
    staging.touch()


def with_content(staging: Path) -> None:
    (staging / "folder").mkdir(parents=True)


def with_working_files_that_are_a_link(staging: Path) -> None:
    staging.mkdir()
    a_link(staging / ".work")


def with_a_holder_that_is_a_link(staging: Path) -> None:
    (staging / ".work").mkdir(parents=True)
    (staging / ".work" / "holder").symlink_to(staging.parent / "victim")


def with_other_working_files(staging: Path) -> None:
    (staging / ".work" / "mine").mkdir(parents=True)


def another_users(staging: Path) -> None:
    staging.mkdir()
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    os.chown(staging, 4321, -1)


@pytest.mark.parametrize(
    "left",
    [
        a_link,
        a_file,
        with_content,
        with_working_files_that_are_a_link,
        with_a_holder_that_is_a_link,
        with_other_working_files,
        another_users,
    ],
)
def test_a_staging_directory_that_no_run_left_is_refused_and_stays(
    tmp_path: Path, left: Callable[[Path], None]
) -> None:
    (tmp_path / "victim").write_text("precious")
    left(staging_place(tmp_path / "out"))
    before = sorted(tmp_path.rglob("*"))
    for start in (make, lambda output: require_can_start(output, True, ASKED, resume=False)):
        with pytest.raises(ConfigError, match=r"\.out\.partial.*move or remove that"):
            start(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "victim").read_text() == "precious"


def test_an_empty_staging_directory_of_ones_own_is_taken(tmp_path: Path) -> None:
    (staging_place(tmp_path / "out") / ".work").mkdir(parents=True)
    make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_link_in_a_staging_directory_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    staging = staging_place(tmp_path / "out")
    (staging / ".work").mkdir(parents=True)
    (staging / ".work" / "holder").touch()
    (staging / "link").symlink_to(tmp_path / "elsewhere")
    make(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "mine").exists()
    assert not (tmp_path / "out" / "link").exists()
