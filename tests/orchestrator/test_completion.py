"""A complete output has a mark, and whoever calls an output complete checks it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.completion import MARK, find_damage, mark_complete
from orchestrator.config import ConfigError
from orchestrator.output.staging import is_finished, open_staging
from orchestrator.tracking import TrackingError, TrackingOptions, log_output, tracked_run

ASKED = {"sparsity": [0.2]}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A complete output with a journal."""
    with open_staging(tmp_path / "out", False, ASKED) as staging:
        with tracked_run(TrackingOptions(tracking_uri="none"), staging.directory / "pruning" / "metrics.jsonl"):
            pass
        (staging.directory / "model.safetensors").write_bytes(bytes(range(256)))
        (staging.directory / "README.md").write_text("# A model")
        (staging.directory / "empty").mkdir()
    return tmp_path / "out"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("change", [cut, zero, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "pruning/asked.json", MARK])
def test_a_file_that_is_not_as_the_run_left_it_is_told(
    output: Path, change: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    change(output / name)
    if change is Path.unlink and name in (MARK, "pruning/asked.json"):
        assert not is_finished(output, ASKED)
    else:
        with pytest.raises(ConfigError, match=name):
            is_finished(output, ASKED)
    with pytest.raises(TrackingError, match=f"{'incomplete' if not (output / MARK).exists() else name}"):
        log_output(output, tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(ConfigError, match=rf"{MARK if not (output / MARK).exists() else 'is not empty'}.*--overwrite"):
        open_staging(output, False, ASKED, resume=True).__enter__()


def test_what_people_add_or_edit_and_a_journal_that_grows_are_no_damage(output: Path) -> None:
    (output / "note.txt").write_text("mine")
    (output / "README.md").write_text("# My model")
    with (output / "pruning" / "metrics.jsonl").open("a") as journal:
        journal.write("more\n")
    assert find_damage(output) is None
    assert is_finished(output, ASKED)


def test_the_mark_of_a_stranger_leads_nowhere(output: Path) -> None:
    for name in ("../secret", "/etc/passwd", "a/../../secret"):
        (output / MARK).write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}}))
        assert "outside" in (find_damage(output) or "")


@pytest.mark.parametrize("text", ["", "\0" * 40, "[]", "{}", '{"files": []}', '{"files": {"empty": 3}}'])
def test_a_mark_that_is_damaged_itself_is_none(output: Path, text: str) -> None:
    (output / MARK).write_text(text)
    assert find_damage(output) is not None


def test_everything_is_on_the_disk_before_the_mark(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    (output / MARK).unlink()
    monkeypatch.setattr(os, "fsync", note)
    mark_complete(output, leave_out=".work")
    expected = {str(path) for path in (output, *output.rglob("*")) if path.name != MARK}
    before = flushed[: flushed.index(str(output / f"{MARK}.partial"))]
    assert set(before) == expected
    # A folder after its files, or the folder's entries may be missing.
    assert all(
        before.index(str(path.parent)) > before.index(str(path)) for path in output.rglob("*") if str(path) in before
    )
