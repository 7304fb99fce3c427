"""Builds an output in a staging directory, which is renamed to the output's name once it is complete.

.NAME.partial/                  next to the output; becomes the output
.NAME.partial/pruning/asked.json    the settings; a resumed run must have the same
.NAME.partial/.work/            working files, deleted when the output is complete
    holder                      names the process that writes here, which locks the file while it runs
    settled.json                choices made during the run that must not change: workers, micro-batches
    solved/                     results so far; if empty, a failed run leaves nothing behind
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.config import ConfigError
from orchestrator.output.lock import hold_lock
from slimllm_ops.errors import ReadBackError, UnsolvableError
from slimllm_ops.files import flush, write_json

T = TypeVar("T")

# What the system says of a full disk: of its size, of a user's share, of a file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The settings that an output was made with.
ASKED = Path("pruning/asked.json")


@dataclass(frozen=True)
class Notes:
    """Named values in a JSON file; each is computed once, even if the process is killed and the run resumed."""

    path: Path

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Return the stored value; if there is none, compute and store it."""
        noted = self._read()
        if name not in noted:
            noted[name] = compute()
            write_json(self.path, noted)
        return noted[name]

    def get(self, name: str) -> Any:
        """Return the stored value; None if there is none."""
        return self._read().get(name)

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}


@dataclass(frozen=True)
class Staging:
    """A directory that becomes the output, with the working files from which an interrupted run resumes."""

    directory: Path
    resumed: bool = False

    @property
    def work(self) -> Path:
        """The folder of working files, which are not part of the output."""
        return self.directory / ".work"

    @property
    def lock_file(self) -> Path:
        """The file that names the process writing here."""
        return self.work / "holder"

    @property
    def solved(self) -> Path:
        """The folder of results so far, kept when the run ends early."""
        return self.work / "solved"

    def is_solved(self) -> bool:
        """Return whether there are any results yet."""
        return any(path.is_file() for path in self.solved.rglob("*"))

    @property
    def settled(self) -> Notes:
        """Choices made during the run, which must stay the same when it resumes."""
        return Notes(self.work / "settled.json")

    @property
    def results(self) -> Notes:
        """Numbers computed by passes over the data."""
        return Notes(self.solved / "results.json")


@contextmanager
def open_staging(
    output: Path, overwrite: bool, asked: dict[str, Any] | None = None, resume: bool = False
) -> Iterator[Staging]:
    """Open a staging directory next to `output`, and rename it to `output` at the end.

    After an error, keep the directory if it holds results, so that a run with the same settings and `resume` can
    continue from them; otherwise delete it.

    Args:
        output: The final directory.
        overwrite: Whether to replace an existing output.
        asked: The settings that the result depends on, as JSON values; without them nothing is kept after an error.
        resume: Whether to continue from earlier results.

    Raises:
        ConfigError: The output exists and is not empty, is being written by another run, or cannot be written; an
            unfinished earlier run is in the way, with neither `resume` nor `overwrite`; or the run to resume had
            other settings.
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
    """Return whether an output is complete.

    Raises:
        ConfigError: It is complete, but was made with other settings.
    """
    # With an unfinished run next to it, the output may be an older one that this run is about to overwrite.
    if not (output / ASKED).exists() or has_unfinished_run(output):
        return False
    require_same(json.loads((output / ASKED).read_text()), asked, f"output {output}")
    # A run may be killed after it renamed the output and before it deleted the working files.
    shutil.rmtree(output / ".work", ignore_errors=True)
    return True


def require_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that already exists, unless it may be overwritten.

    Raises:
        ConfigError: The output is a file, or a directory that is not empty.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"output {output} is not empty: choose another --output, or pass --overwrite to replace it")


def staging_directory(output: Path) -> Path:
    """Return the directory in which an output is staged, whether or not it exists."""
    return _staging(output).directory


def require_can_start(output: Path, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> None:
    """Refuse an output that `open_staging` would refuse, as far as this shows without writing anything.

    Args:
        output: The final directory.
        overwrite: Whether to replace an existing output.
        asked: The settings that the result depends on; None if they are not known yet.
        resume: Whether to continue from earlier results.

    Raises:
        ConfigError: As for `open_staging`.
    """
    require_free(output, overwrite)
    _can_resume(_staging(output), overwrite, asked, resume)
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output {output} cannot be written: {nearest} is not a writable folder; choose another --output"
        )


def _staging(output: Path) -> Staging:
    # A path such as "." has a name and a parent only once it is absolute.
    output = output.absolute()
    return Staging(output.parent / f".{output.name}.partial")


def has_unfinished_run(output: Path) -> bool:
    """Return whether an unfinished earlier run of an output left its staging directory."""
    return _staging(output).directory.exists()


@contextmanager
def _lock_staging(output: Path) -> Iterator[Staging]:
    """Make the staging directory, and hold its lock inside the block."""
    staging = _staging(output)
    with hold_lock(staging.lock_file, str(output)):
        yield staging


def _begin(staging: Staging, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> Staging:
    """Take over what an earlier run left, or start with an empty directory."""
    if asked is not None and _can_resume(staging, overwrite, asked, resume):
        return Staging(staging.directory, resumed=True)
    try:
        _start_over(staging, asked)
    except OSError:
        shutil.rmtree(staging.directory, ignore_errors=True)
        raise
    return staging


def _start_over(staging: Staging, asked: dict[str, Any] | None) -> None:
    """Empty a staging directory, and note what was asked."""
    for path in (*staging.directory.iterdir(), *staging.work.iterdir()):
        if path not in (staging.work, staging.lock_file):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    staging.solved.mkdir()
    if asked is not None:
        (staging.directory / ASKED).parent.mkdir()
        write_json(staging.directory / ASKED, asked, indent=1)


def _can_resume(staging: Staging, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> bool:
    """Return whether there is an earlier run to resume.

    Raises:
        ConfigError: It had other settings; or it has results, and neither `resume` nor `overwrite` is given.
    """
    earlier = staging.directory / ASKED
    if not earlier.exists():
        return False
    if resume and asked is not None:
        require_same(json.loads(earlier.read_text()), asked, f"the unfinished run in {staging.directory}")
    if not resume and not overwrite and staging.is_solved():
        raise ConfigError(
            f"an earlier run of this output was not finished, and {staging.directory} holds what it solved: "
            f"pass --resume to continue from there, or --overwrite to start over"
        )
    return resume


def require_same(earlier: dict[str, Any], asked: dict[str, Any], described: str) -> None:
    """Refuse settings that differ from those of an earlier run.

    Raises:
        ConfigError: At least one setting differs.
    """
    asked = json.loads(json.dumps(asked))
    differing = sorted(name for name in earlier.keys() | asked.keys() if earlier.get(name) != asked.get(name))
    if differing:
        differences = ", ".join(f"{name} {earlier.get(name)} there, {asked.get(name)} here" for name in differing)
        raise ConfigError(
            f"{described} had other settings ({differences}): pass the same settings, model and data, "
            f"or --overwrite without --resume to start over"
        )


@contextmanager
def _keep_if_solved(staging: Staging, resumable: bool) -> Iterator[None]:
    """After an error, keep the results and say so; if there are none, delete the directory."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL:
            error.filename = error.filename or str(staging.directory)
        # Unsolvable weights or data, and wrong files, would fail the same way next time.
        hopeless = isinstance(error, UnsolvableError | ReadBackError)
        if resumable and staging.is_solved() and not hopeless:
            error.add_note(
                f"what was solved is in {staging.directory}: run the same command with --resume to continue from there"
            )
        else:
            shutil.rmtree(staging.directory, ignore_errors=True)
        raise


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories in order, up to the first that is not empty; after a success none is empty."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _replace(staging: Staging, output: Path) -> None:
    """Move the old output aside and the new one into its place, then delete the old one, so one always exists."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    staging.directory.rename(output)
    flush(output.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(output / staging.work.name, ignore_errors=True)
