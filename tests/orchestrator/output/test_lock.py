"""At most one process writes an output; where nothing can be locked, a run says so and leaves nothing."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from orchestrator.config import ConfigError
from orchestrator.output.destination import Destination, deliver_output
from orchestrator.output.lock import hold_lock
from orchestrator.output.staging import open_staging
from orchestrator.sources.storage.process import RefusedError, Store, fetch_file

# What systems answer that have no locks, or none just now.
REFUSALS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO)


@pytest.fixture(params=REFUSALS, ids=errno.errorcode.get)
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system without locks, and the reason that it gives."""

    def refuse(file: object, how: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return os.strerror(request.param)


def test_an_output_that_cannot_be_locked_is_refused_and_nothing_is_left(tmp_path: Path, reason: str) -> None:
    output = tmp_path / "new" / "out"
    with pytest.raises(ConfigError) as raised, open_staging(output, overwrite=False):
        pass
    assert str(raised.value) == (
        f"output {output} cannot be locked ({reason}): the file system of {tmp_path}/new/.out.partial/.work has no "
        f"locks, so two runs could write there at once; choose an --output on another file system"
    )
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_run_left_stays(tmp_path: Path, reason: str) -> None:
    holder = tmp_path / "out" / "holder"
    holder.parent.mkdir()
    holder.write_text("process 7 on elsewhere")
    with pytest.raises(ConfigError, match="cannot be locked"), hold_lock(holder, "out"):
        pass
    assert holder.read_text() == "process 7 on elsewhere"


def test_an_output_for_a_store_is_made_in_a_cache_that_has_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = Destination.of("memory://bucket/out")
    with pytest.raises(ConfigError) as raised, deliver_output(output, False, print):
        pass
    assert f"cannot be locked ({reason})" in str(raised.value)
    assert str(raised.value).endswith("set XDG_CACHE_HOME to a folder on another file system")


def test_what_is_fetched_goes_to_a_cache_that_has_locks(tmp_path: Path, reason: str) -> None:
    Store("memory://bucket/text.txt").files.pipe_file("/bucket/text.txt", b"text")
    with pytest.raises(RefusedError) as raised:
        fetch_file("memory://bucket/text.txt", cache=str(tmp_path), name="text.txt")
    found = f"{tmp_path}, where it is copied to, cannot be locked ({reason})"
    assert str(raised.value) == f"memory://bucket/text.txt: {found}: set XDG_CACHE_HOME to a file system that has locks"
