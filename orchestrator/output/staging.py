"""The output directory: it appears under its name only when it is whole, and what is solved waits beside it.

.NAME.partial/                  beside the output; becomes it
.NAME.partial/pruning/asked.json    what was asked: who resumes must ask the same
.NAME.partial/.work/            what is not part of the output, and goes when it is whole
    holder                      who writes here, locked for as long as they live
    settled.json                what was settled on the way, and must not change: workers, micro-batches
    solved/                     what is solved so far; where it is empty, nothing is left behind
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.config import ConfigError
from slimllm_ops.errors import ReadBackError, UnsolvableError
from slimllm_ops.files import flush, write_json

T = TypeVar("T")

# What an output says that it was asked to be.
ASKED = Path("pruning/asked.json")


@dataclass(frozen=True)
class Notes:
    """Values by name, in a JSON file, each computed once whatever becomes of the process."""

    path: Path

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Return the value of that name that was noted before; else compute it, and note it."""
        noted = json.loads(self.path.read_text()) if self.path.exists() else {}
        if name not in noted:
            noted[name] = compute()
            write_json(self.path, noted)
        return noted[name]


@dataclass(frozen=True)
class Staging:
    """A directory that becomes the output, and what its run goes on from if it ends before that."""

    directory: Path
    resumed: bool = False

    @property
    def work(self) -> Path:
        """What is not part of the output."""
        return self.directory / ".work"

    @property
    def lock_file(self) -> Path:
        """Who writes here."""
        return self.work / "holder"

    @property
    def solved(self) -> Path:
        """What is solved; to be kept when the run ends early."""
        return self.work / "solved"

    def is_solved(self) -> bool:
        """Return whether anything is."""
        return any(path.is_file() for path in self.solved.rglob("*"))

    @property
    def settled(self) -> Notes:
        """What was settled on the way and must be the same when the run is resumed."""
        return Notes(self.work / "settled.json")

    @property
    def results(self) -> Notes:
        """Numbers that passes over the data gave."""
        return Notes(self.solved / "results.json")


@contextmanager
def open_staging(
    output: Path, overwrite: bool, asked: dict[str, Any] | None = None, resume: bool = False
) -> Iterator[Staging]:
    """Open a directory beside `output` to write in; at the end it becomes `output`.

    After an error it stays if something is solved in it, for whoever asks the same with `resume`; else it goes.

    Args:
        output: where it is to appear.
        overwrite: whether what is there is replaced.
        asked: what the result depends on, as JSON has it; without it nothing can be resumed, and nothing stays.
        resume: whether to go on from what is solved.

    Raises:
        ConfigError: the output exists and is not empty, is being written by another run, or its place cannot be
            written to; an earlier run was not finished, and is neither to be resumed nor to be overwritten; or it is
            to be resumed, and was asked something else.
    """
    require_free(output, overwrite)
    output = output.absolute()
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        with _lock_staging(output) as staging:
            staging = _begin(staging, overwrite, asked, resume)
            with _keep_if_solved(staging, resumable=asked is not None):
                yield staging
                _replace(staging, output)
    finally:
        _remove_empty(made)


def is_finished(output: Path, asked: dict[str, Any]) -> bool:
    """Return whether an output is whole, and is what is asked.

    Raises:
        ConfigError: it is whole, but was asked to be something else.
    """
    # What is there may be the result of earlier settings, which an unfinished run is about to overwrite.
    if not (output / ASKED).exists() or has_unfinished_run(output):
        return False
    require_same(json.loads((output / ASKED).read_text()), asked, f"output {output}")
    # A run may end between giving the output its name and this.
    shutil.rmtree(output / ".work", ignore_errors=True)
    return True


def require_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that holds something, unless it may be overwritten.

    Raises:
        ConfigError: the output is a file, or a directory that is not empty.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"output {output} is not empty: choose another --output, or pass --overwrite to replace it")


def staging_directory(output: Path) -> Path:
    """Return the directory in which a run of this output writes until it is whole, there or not."""
    return _staging(output).directory


def require_can_start(output: Path, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> None:
    """Refuse an output that `open_staging` would refuse, as far as can be told without writing anything.

    Args:
        output: where it is to appear.
        overwrite: whether what is there is replaced.
        asked: what the result depends on; None where that is not known yet.
        resume: whether to go on from what is solved.

    Raises:
        ConfigError: as `open_staging` raises it.
    """
    require_free(output, overwrite)
    _can_resume(_staging(output), overwrite, asked, resume)
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output {output} cannot be written: {nearest} is no folder to write in; choose another --output"
        )


def _staging(output: Path) -> Staging:
    # Of a name such as "." the place beside it is known only once it is absolute.
    output = output.absolute()
    return Staging(output.parent / f".{output.name}.partial")


def has_unfinished_run(output: Path) -> bool:
    """Return whether an earlier run of an output was not finished, and left what it had."""
    return _staging(output).directory.exists()


@contextmanager
def _lock_staging(output: Path) -> Iterator[Staging]:
    """Make the directory beside the output, and hold its lock for as long as this process lives."""
    staging = _staging(output)
    with hold_lock(staging.lock_file, str(output)):
        yield staging


@contextmanager
def hold_lock(holder: Path, output: str) -> Iterator[None]:
    """Hold the lock of an output for as long as this process lives; the file says which process holds it.

    Raises:
        ConfigError: another run holds it, or the file cannot be written.
    """
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        file = holder.open("a+")
    except OSError as error:
        raise ConfigError(f"output {output} cannot be written: {error.strerror}; choose another --output") from error
    with file:
        try:
            # The system lets go of it when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"output {output} is being written by another run ({file.read().strip()}): "
                f"wait for it, or choose another --output"
            ) from None
        if not holder.exists():
            raise ConfigError(f"output {output} was finished by another run just now: choose another --output")
        file.truncate(0)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}")
        file.flush()
        yield


def _begin(staging: Staging, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> Staging:
    """Take over what an earlier run left, or begin with nothing."""
    if asked is not None and _can_resume(staging, overwrite, asked, resume):
        return Staging(staging.directory, resumed=True)
    earlier = staging.directory / ASKED
    for path in (*staging.directory.iterdir(), *staging.work.iterdir()):
        if path not in (staging.work, staging.lock_file):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    staging.solved.mkdir()
    if asked is not None:
        earlier.parent.mkdir()
        write_json(earlier, asked, indent=1)
    return staging


def _can_resume(staging: Staging, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> bool:
    """Return whether there is an earlier run to go on with; refuse one that is neither the same nor to be replaced."""
    earlier = staging.directory / ASKED
    if not earlier.exists():
        return False
    if resume and asked is not None:
        require_same(json.loads(earlier.read_text()), asked, f"the run in {staging.directory} that is unfinished")
    if not resume and not overwrite and staging.is_solved():
        raise ConfigError(
            f"an earlier run of this output was not finished, and {staging.directory} holds what it solved: "
            f"pass --resume to go on from there, or --overwrite to begin anew"
        )
    return resume


def require_same(earlier: dict[str, Any], asked: dict[str, Any], described: str) -> None:
    """Refuse to take one thing for another.

    Raises:
        ConfigError: what was asked earlier differs from what is asked.
    """
    asked = json.loads(json.dumps(asked))
    differing = sorted(name for name in earlier.keys() | asked.keys() if earlier.get(name) != asked.get(name))
    if differing:
        differences = ", ".join(f"{name} {earlier.get(name)} there, {asked.get(name)} here" for name in differing)
        raise ConfigError(
            f"{described} was asked for something else ({differences}): pass the settings, the model and the data that "
            f"it had, or --overwrite without --resume to begin anew"
        )


@contextmanager
def _keep_if_solved(staging: Staging, resumable: bool) -> Iterator[None]:
    """After an error keep what is solved, and say so; else leave nothing."""
    try:
        yield
    except BaseException as error:
        # Weights and data that give no answer would give none the next time, nor would files that are wrong be right.
        hopeless = isinstance(error, UnsolvableError | ReadBackError)
        if resumable and staging.is_solved() and not hopeless:
            error.add_note(f"what was solved is in {staging.directory}: the same command with --resume goes on from it")
        else:
            shutil.rmtree(staging.directory, ignore_errors=True)
        raise


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories in order as long as they are empty; after a success they are not."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _replace(staging: Staging, output: Path) -> None:
    """Move what was there aside, the new directory in, and then delete the old: never nothing in its place."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    staging.directory.rename(output)
    flush(output.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(output / staging.work.name, ignore_errors=True)
