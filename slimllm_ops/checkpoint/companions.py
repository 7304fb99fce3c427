"""Plans which files a pruned model takes over from its source: all that stand beside the weights, with exceptions.

The tables say what is left out. A folder comes along whole, or not at all. The plan opens every file once, so that a
run that cannot copy one says so before it computes anything.
"""

import json
import os
import pickletools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.files import NotPlainError, copy_file, open_plain, read_plain, require_plain, stays_inside, write_json

# What every pruned model has anew, and hidden files. Nobody misses them.
WRITTEN_NEW = (
    ".*",
    "__pycache__",
    "config.json",
    "model*.safetensors",
    "*.safetensors.index.json",
    "readme*",
    "pruning",
    "complete.json",
    "pruned_*.py",
)
# What does not come along, and is told. Names are compared in lower case.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "dense weights": (
        *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx"),
        *("*.onnx_data*", "*.tflite", "*.npy", "*.npz", "*.nemo", "*.engine", "*.mlmodel", "*.pdparams", "*.ot"),
        *("*.index.json", "params.json"),
    ),
    "code": (
        *("*.py", "*.py[cdiowxz]", "*.pyzw", "*.pxd", "*.so", "*.so.*", "*.sh", "*.ipynb", "*.dll", "*.dylib", "*.exe"),
        "requirements*.txt",
    ),
    "pickle": ("*.pkl", "*.pickle", "*.joblib", "*.dill"),
    "archive": ("*.zip", "*.tar", "*.gz", "*.tgz", "*.xz", "*.bz2", "*.7z", "*.zst", "*.whl", "*.jar"),
    "training state": ("trainer_state.json", "*_results.json", "events.out.tfevents*", "latest", "*.log"),
    # What sentence-transformers imports, for a local directory without a flag.
    "names code": ("modules.json",),
    "describes other weights": ("adapter_config.json", "*quant*config*.json"),
    "picture or data": (
        *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.wav"),
        *("*.parquet", "*.arrow", "*.csv"),
    ),
}
# Keys by which transformers finds Python code, in the directory or in any repository of the hub.
NAMES_CODE = ("auto_map", "custom_pipelines")
# The same by what a file begins with, whatever its name.
BEGINNINGS = {
    **{bytes([0x80, protocol]): "pickle" for protocol in range(2, 6)},
    b"PK\x03\x04": "archive",
    b"GGUF": "dense weights",
    b"\x7fELF": "code",
    b"#!": "code",
}
# What a run writes into the folder of its record.
RECORD = "pruning"
RECORDED = ("plan.json", "importance.parquet", "metrics.jsonl", "run.toml", "sweep.csv", "*.png")
# The largest file, the largest sum of all, and the most files of a folder; text beside weights is far below.
LARGEST_FILE = 1 << 27
LARGEST_SUM = 1 << 29
MOST_FILES = 1000
# As many operations of a pickle are read.
LONGEST_PICKLE = 1 << 20
# As many names as a line has room for.
NAMED = 8


@dataclass(frozen=True)
class Companions:
    """The files beside a model's weights: those that come along, and those that do not, each with the reason."""

    directory: Path
    files: tuple[Path, ...]
    left_out: tuple[tuple[str, str], ...]

    def copy(self, directory: Path) -> None:
        """Copy the files' content into a directory, without the keys that name code."""
        for file in self.files:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            copy_data(self.directory / file, directory / file)

    def told(self) -> str | None:
        """Return a line that says what does not come along, or None."""
        if not self.left_out:
            return None
        named = [f"{shown(name)} ({reason})" for name, reason in self.left_out[:NAMED]]
        more = len(self.left_out) - len(named)
        rest = f" and {more} more" if more else ""
        return f"not copied from {self.directory}: {', '.join(named)}{rest}"


def copy_data(file: Path, copy: Path) -> None:
    """Copy a file; one with JSON that names Python code loses the keys that do, and is otherwise copied as it is."""
    described = _without_code(file) if file.suffix.lower() == ".json" else None
    if described is None:
        copy_file(file, copy)
    else:
        write_json(copy, described, indent=2)


def _without_code(file: Path) -> Any | None:
    """Return the content of a JSON file without the keys that name code; None if it has none of them."""
    found: list[str] = []

    def data_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # A vocabulary may have a word of this name, and its value is a number.
        names = {key for key, value in pairs if key in NAMES_CODE and not isinstance(value, int | float)}
        found.extend(names)
        return {key: value for key, value in pairs if key not in names}

    # What Python cannot read, transformers cannot either.
    with suppress(ValueError, RecursionError):
        described = json.loads(read_plain(file, LARGEST_FILE).decode("utf-8"), object_pairs_hook=data_of)
        return described if found else None
    return None


def plan_companions(directory: Path) -> Companions:
    """Return which files of a model directory come along.

    Raises:
        CheckpointError: A file that should come along cannot be copied: a pipe, no permission, a link that is broken
            or leads out of the directory.
    """
    files: list[Path] = []
    left_out: list[tuple[str, str]] = []
    total = 0
    # First the files of the directory itself: they matter most if there are too many.
    for entry in sorted(_entries(directory), key=lambda path: (_is_folder(path), path.name)):
        name = f"{entry.name}/" if _is_folder(entry) else entry.name
        if _matches(entry, WRITTEN_NEW):
            continue
        found = _folder_files(entry) if _is_folder(entry) else [entry]
        reason = found if isinstance(found, str) else _why_not(directory, found)
        size = 0 if reason else sum(one.stat().st_size for one in found if isinstance(one, Path))
        if not reason and total + size > LARGEST_SUM:
            reason = f"more than {LARGEST_SUM >> 20} MiB with the others"
        if reason or isinstance(found, str):
            left_out.append((name, str(reason)))
            continue
        total += size
        files += [one.relative_to(directory) for one in found]
    return Companions(directory, tuple(files), tuple(left_out))


def plan_record(directory: Path) -> Companions:
    """Return the files that a run wrote into its record beside a model's weights; none if there is no record.

    Raises:
        CheckpointError: The record leads out of the directory, or one of its files cannot be copied.
    """
    folder = directory / RECORD
    found = _folder_files(folder) if _is_folder(folder) else []
    if isinstance(found, str):
        raise _cannot_copy(folder, found)
    files = [file for file in found if _matches(file, RECORDED)]
    for file in files:
        _beginning(directory, file)
    return Companions(directory, tuple(file.relative_to(directory) for file in files), ())


def _entries(directory: Path) -> Iterator[Path]:
    try:
        yield from directory.iterdir()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed ({error.strerror}): make it readable") from error


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def _folder_files(folder: Path) -> list[Path] | str:
    """Return the visible files in a folder, or the reason why the folder does not come along."""
    if folder.is_symlink():
        return "a link to a folder"
    paths = list(islice(folder.rglob("*"), MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        return f"more than {MOST_FILES:,} files"
    if any(path.name == "config.json" for path in paths):
        return "another model"
    if any(path.is_symlink() and _is_folder(path) for path in paths):
        return "holds a link to a folder"
    for one in (folder, *filter(_is_folder, paths)):
        # Python passes over a folder that it may not list.
        if not os.access(one, os.R_OK | os.X_OK):
            raise _cannot_copy(one, "it cannot be listed")
    hidden = {path for path in paths if any(part.startswith(".") for part in path.relative_to(folder).parts)}
    return sorted(path for path in paths if path not in hidden and not _is_folder(path))


def _why_not(directory: Path, files: Sequence[Path]) -> str | None:
    """Return the reason why files do not come along: that of the first that does not; None if all do."""
    reasons = (_reason(directory, file) for file in files)
    return next((reason for reason in reasons if reason is not None), None)


def _reason(directory: Path, file: Path) -> str | None:
    """Return the reason why a file does not come along, after checking that it can be copied if it does.

    Raises:
        CheckpointError: It should come along, but cannot be copied.
    """
    for reason, patterns in LEFT_OUT.items():
        if _matches(file, patterns):
            return reason
    beginning = _beginning(directory, file)
    for begins, reason in BEGINNINGS.items():
        if beginning.startswith(begins):
            return reason
    if (size := file.stat().st_size) > LARGEST_FILE:
        return f"{size / 1e6:,.0f} MB, more than such a file needs"
    return "pickle" if _is_old_pickle(file) else None


def _beginning(directory: Path, file: Path) -> bytes:
    """Return the first bytes of a plain file.

    Raises:
        CheckpointError: It is none, it leads out of the directory, or it cannot be read.
    """
    try:
        require_plain(file)
    except NotPlainError as error:
        raise _cannot_copy(file, str(error.strerror)) from error
    except OSError as error:
        raise _cannot_copy(file, "it is a broken link" if file.is_symlink() else str(error.strerror)) from error
    if not stays_inside(file, directory):
        raise _cannot_copy(file, f"it is a link to {shown(str(file.resolve()), 200)}, which is outside the directory")
    try:
        with open_plain(file) as opened:
            return opened.read(8)
    except OSError as error:
        raise _cannot_copy(file, str(error.strerror)) from error


def _is_old_pickle(file: Path) -> bool:
    """Return whether a file holds a pickle of protocol 0 or 1, which has no beginning of its own."""
    # As bytes in memory, because an operation may ask for more than the file has.
    content = BytesIO(read_plain(file, LARGEST_FILE))
    with suppress(Exception):
        # Of text, the first character or the next is no operation.
        return len(list(islice(pickletools.genops(content), LONGEST_PICKLE))) > 2
    return False


def _cannot_copy(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} stands beside the weights and cannot be copied ({reason}): "
        f"put a readable file in its place, or remove it"
    )


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name.lower(), pattern) for pattern in patterns)
