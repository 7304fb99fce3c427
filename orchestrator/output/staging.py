"""Builds an output in a staging directory, which takes the output's place once it is complete (swap.py).

.NAME.partial/                  next to the output, or in it if it is a mount point; becomes the output
.NAME.partial/pruning/asked.json    the settings; a resumed run must have the same
.NAME.partial/complete.json         the mark of a complete output, written last (orchestrator/completion.py)
.NAME.partial/.work/            working files, deleted when the output is complete
    holder                      names the process that writes here, which locks the file while it runs
    settled.json                choices made during the run that must not change: workers, micro-batches
    solved/                     results so far; if empty, a failed run leaves nothing behind
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.completion import ASKED, MARK, find_damage, is_marked, mark_complete
from orchestrator.config import ConfigError
from orchestrator.output.lock import hold_lock
from orchestrator.output.notes import Notes, read_settings
from orchestrator.output.place import HOLDER, WORK, content_of, real_place, require_own, staging_place
from orchestrator.output.swap import discard, empty, is_publishing, publish, recover
from slimllm_ops.errors import ReadBackError, UnsolvableError
from slimllm_ops.files import write_json

# What the system says of a full disk: of its size, of a user's share, of a file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Staging:
    """A directory that becomes the output, with the working files from which an interrupted run resumes."""

    directory: Path
    resumed: bool = False

    @property
    def work(self) -> Path:
        """The folder of working files, which are not part of the output."""
        return self.directory / WORK

    @property
    def lock_file(self) -> Path:
        """The file that names the process writing here."""
        return self.work / HOLDER

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
        return Notes(self.solved / "results.json", replaceable=True)


@contextmanager
def open_staging(
    output: Path, overwrite: bool, asked: dict[str, Any] | None = None, resume: bool = False
) -> Iterator[Staging]:
    """Open a staging directory for `output`, and put it in the output's place at the end, marked as complete.

    After an error, keep the directory if it holds results, so that a run with the same settings and `resume` can
    continue from them; otherwise delete it.

    Args:
        output: The final directory.
        overwrite: Whether to replace an existing output.
        asked: The settings that the result depends on, as JSON values; without them nothing is kept after an error.
        resume: Whether to continue from earlier results.

    Raises:
        ConfigError: The output exists and is not empty, is being written by another run, or cannot be written; its
            staging directory is not ours; an unfinished earlier run is in the way, with neither `resume` nor
            `overwrite`; or the run to resume had other settings.
    """
    _recover(output)
    require_free(output, overwrite)
    place = real_place(output)
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        with _lock_staging(output) as staging:
            staging = _begin(staging, overwrite, asked, resume)
            with _keep_if_solved(staging, resumable=asked is not None):
                yield staging
                mark_complete(staging.directory, leave_out=WORK)
                publish(staging.directory, place)
    finally:
        _remove_empty(made)


def is_finished(output: Path, asked: dict[str, Any]) -> bool:
    """Return whether an output is complete: whether it has the mark, and every file is as the mark says.

    Raises:
        ConfigError: It was complete, but was made with other settings, or is damaged.
    """
    _recover(output)
    # With an unfinished run next to it, the output may be an older one that this run is about to overwrite.
    if not is_marked(output) or not (output / ASKED).exists() or has_unfinished_run(output):
        return False
    require_same(read_settings(output / ASKED), asked, f"output {output}")
    if damage := find_damage(output):
        raise ConfigError(
            f"output {output} is damaged: {damage}; pass --overwrite without --resume to make it again, "
            f"or choose another --output"
        )
    return True


def require_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that already exists, unless it may be overwritten.

    Raises:
        ConfigError: The output is a file, or a directory that is not empty, or that cannot be replaced.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file: choose another --output")
    if not output.is_dir() or not content_of(real_place(output), staging_place(output)):
        return
    if not overwrite:
        incomplete = (output / ASKED).exists() and not is_marked(output)
        found = f"is incomplete (it has no {MARK})" if incomplete else "is not empty"
        raise ConfigError(f"output {output} {found}: choose another --output, or pass --overwrite to replace it")
    if not os.access(output, os.W_OK | os.X_OK):
        raise ConfigError(f"output {output} cannot be replaced: it is read-only; choose another --output")


def require_can_start(output: Path, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> None:
    """Refuse an output that `open_staging` would refuse, as far as this shows without making anything.

    What a crash of an earlier run cut short is put in order first.

    Args:
        output: The final directory.
        overwrite: Whether to replace an existing output.
        asked: The settings that the result depends on; None if they are not known yet.
        resume: Whether to continue from earlier results.

    Raises:
        ConfigError: As for `open_staging`.
    """
    _recover(output)
    require_free(output, overwrite)
    staging = _staging(output)
    require_own(staging.directory, output)
    _can_resume(staging, overwrite, asked, resume)
    nearest = next(parent for parent in staging.directory.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output {output} cannot be written: {nearest} is not a writable folder; choose another --output"
        )


def _staging(output: Path) -> Staging:
    return Staging(staging_place(output))


def _recover(output: Path) -> None:
    """Complete or undo what a crash of an earlier run cut short."""
    try:
        recover(staging_place(output), real_place(output))
    except OSError as error:
        raise ConfigError(
            f"output {output}: what an earlier run left cannot be put in order ({error}); choose another --output"
        ) from error


def has_unfinished_run(output: Path) -> bool:
    """Return whether an unfinished earlier run of an output left its staging directory."""
    return _staging(output).directory.exists()


@contextmanager
def _lock_staging(output: Path) -> Iterator[Staging]:
    """Make the staging directory, and hold its lock inside the block."""
    staging = _staging(output)
    require_own(staging.directory, output)
    with hold_lock(staging.lock_file, str(output)):
        yield staging


def _begin(staging: Staging, overwrite: bool, asked: dict[str, Any] | None, resume: bool) -> Staging:
    """Take over what an earlier run left, or start with an empty directory."""
    if asked is not None and _can_resume(staging, overwrite, asked, resume):
        # It may have come as far as its mark, and may have left files that it was about to rename.
        for path in (staging.directory / MARK, *staging.directory.rglob("*.partial")):
            path.unlink(missing_ok=True)
        return Staging(staging.directory, resumed=True)
    try:
        _start_over(staging, asked)
    except OSError:
        discard(staging.directory)
        raise
    return staging


def _start_over(staging: Staging, asked: dict[str, Any] | None) -> None:
    """Empty a staging directory, and note what was asked."""
    empty(staging.directory)
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
        require_same(read_settings(earlier), asked, f"the unfinished run in {staging.directory}")
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
        elif not is_publishing(staging.directory):
            discard(staging.directory)
        raise


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories in order, up to the first that is not empty; after a success none is empty."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()
