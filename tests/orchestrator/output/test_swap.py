"""The old output or the new one is in its place, whatever cuts the exchange short."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import ConfigError
from orchestrator.output import place, swap
from orchestrator.output.staging import is_finished, open_staging, require_can_start

OLD, NEW = {"sparsity": 0.2}, {"sparsity": 0.3}


class PowerCut(BaseException):
    """The end of a process that cleans nothing up."""


def make(output: Path, asked: dict[str, Any], *, resume: bool = False) -> None:
    with open_staging(output, True, asked, resume=resume) as staging:
        (staging.solved / "layer").touch()
        (staging.directory / "weights").write_text(str(asked))
        (staging.directory / "folder").mkdir(exist_ok=True)


def cannot_exchange(one: Path, other: Path) -> bool:
    return False


@pytest.fixture
def output(tmp_path: Path) -> Path:
    make(tmp_path / "out", OLD)
    return tmp_path / "out"


@pytest.fixture(params=[swap.exchange, cannot_exchange], ids=["exchange", "two renames"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "exchange", request.param)


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Cut the power at a change of the disk, counted from now; what would clean up changes nothing."""
    left = [10**9]

    def changing(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise PowerCut
            return change(*arguments, **more)

        return counted

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (swap, "exchange")):
            patch.setattr(owner, name, changing(getattr(owner, name)))
        for name in ("flush", "write_json"):
            patch.setattr(swap, name, changing(getattr(swap, name)))
        patch.setattr(swap.shutil, "rmtree", changing(swap.shutil.rmtree))

        def cut(after: int) -> None:
            left[0] = after

        yield cut


def publish_cut(output: Path, after: int, cut_at: Callable[[int], None]) -> bool:
    """Make a new output and cut the power in its last step; return whether it came to that."""
    publish = swap.publish

    def cut_publish(staging: Path, place: Path) -> None:
        cut_at(after)
        publish(staging, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.output.staging.publish", cut_publish)
        try:
            make(output, NEW)
        except PowerCut:
            return True
        finally:
            cut_at(10**9)
    return False


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("after", range(8))
def test_a_power_cut_leaves_the_old_the_new_or_what_resumes(
    output: Path, after: int, cut_at: Callable[[int], None], tmp_path: Path
) -> None:
    publish_cut(output, after, cut_at)
    # The next start, whatever it is.
    require_can_start(output, True, NEW, resume=True)
    with pytest.raises(ConfigError, match="is not empty"):
        open_staging(output, False, NEW).__enter__()
    assert (output / "weights").read_text() in (str(OLD), str(NEW))
    assert (output / "folder").is_dir()
    make(output, NEW, resume=True)
    assert is_finished(output, NEW)
    assert list(tmp_path.iterdir()) == [output]
    assert sorted(path.name for path in output.iterdir()) == ["complete.json", "folder", "pruning", "weights"]


def test_the_system_can_exchange_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert swap.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    assert not swap.exchange(tmp_path / "a", tmp_path / "missing")


@pytest.mark.usefixtures("_way")
def test_a_name_of_the_users_is_never_taken(output: Path, tmp_path: Path) -> None:
    for name in (".out.old", ".out.bak", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    make(output, NEW)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.old", ".out.bak", "out.old"}
    assert (tmp_path / ".out.old" / "mine").exists()


def test_an_error_between_two_renames_puts_the_old_one_back(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "exchange", cannot_exchange)
    rename, staging = Path.rename, output.with_name(".out.partial")

    def refuse(path: Path, to: Path) -> Path:
        if path == staging:
            raise PermissionError(1, "refused", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        make(output, NEW)
    assert (output / "weights").read_text() == str(OLD)
    monkeypatch.undo()
    make(output, NEW, resume=True)
    assert is_finished(output, NEW)


@pytest.mark.parametrize("after", range(12))
def test_a_mount_point_is_filled_and_a_power_cut_is_continued(
    output: Path, after: int, cut_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "is_mount", lambda directory: directory == output)
    (output / "lost+found").mkdir()
    inode = output.stat().st_ino
    publish_cut(output, after, cut_at)
    make(output, NEW, resume=True)
    assert is_finished(output, NEW)
    assert output.stat().st_ino == inode
    assert (output / "weights").read_text() == str(NEW)
    names = ["complete.json", "folder", "lost+found", "pruning", "weights"]
    assert sorted(path.name for path in output.iterdir()) == names
