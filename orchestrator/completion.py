"""Marks an output as complete: `complete.json`, written last, has the name, size and digest of every file.

Journals, the model card and the report have only their names there. A journal grows when it is logged later, and each
of its lines shows whether it is whole. People edit the card before they publish a model. The report has the seconds of
one run, and `slimllm report` writes it again.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimllm_ops.errors import CheckpointError
from slimllm_ops.files import flush, naming, open_plain, read_json_object, write_json

MARK = "complete.json"
JOURNAL, REPORT_FILE = "metrics.jsonl", "report.html"
# The settings that an output was made with; `prune` and `calibrate` write them first.
ASKED = Path("pruning/asked.json")
MAY_CHANGE = (JOURNAL, REPORT_FILE, "README.md")
FORMAT = 1
# Enough for the names of hundred thousands of files.
MOST_BYTES = 1 << 26


def mark_complete(directory: Path, leave_out: str) -> None:
    """Flush every file and folder of a directory to the disk, then write its mark.

    Args:
        directory: The directory.
        leave_out: An entry of it that is not part of the output.

    Raises:
        OSError: A file cannot be read or flushed, or the mark cannot be written; the error names the file.
    """
    files: dict[str, dict[str, Any] | None] = {}
    for path in _walk(directory, (leave_out, MARK)):
        with naming(path):
            flush(path)
            if path.is_file():
                files[path.relative_to(directory).as_posix()] = None if path.name in MAY_CHANGE else _measure(path)
    write_json(directory / MARK, {"format": FORMAT, "files": files}, indent=1)


def is_marked(directory: Path) -> bool:
    """Return whether a directory has the mark of a complete output."""
    return (directory / MARK).is_file()


def find_damage(directory: Path) -> str | None:
    """Return what differs from the mark, in words; None if every file is as the mark says."""
    try:
        files = read_json_object(directory / MARK, MOST_BYTES).get("files")
    except CheckpointError as error:
        return str(error)
    if not isinstance(files, dict):
        return f"{directory / MARK} lists no files"
    damages = (_damage_of(directory, name, measured) for name, measured in sorted(files.items()))
    return next((damage for damage in damages if damage is not None), None)


def _damage_of(directory: Path, name: str, measured: object) -> str | None:
    # The mark of a stranger's output must lead to no file outside.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{directory / MARK} names {name!r}, which is outside"
    path = directory / name
    if not path.is_file():
        return f"{path} is missing"
    if measured is None:
        return None
    if not isinstance(measured, dict):
        return f"{directory / MARK} has no size of {name}"
    if (size := path.stat().st_size) != measured.get("bytes"):
        return f"{path} has {size} bytes, expected {measured.get('bytes')}"
    return None if _measure(path) == measured else f"{path} has other bytes than the run wrote"


def _measure(path: Path) -> dict[str, Any]:
    """Return the size and the digest of a file."""
    with open_plain(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _walk(directory: Path, leave_out: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files below a directory in order, each folder after its files, and the directory last."""
    for path in sorted(directory.iterdir()):
        if path.name in leave_out or path.is_symlink():
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path
    yield directory
