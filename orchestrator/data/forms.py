"""Says in which form a file or a folder holds text or tokens, from its name alone, and opens files of text.

The case of a suffix does not matter. Text may be compressed: `corpus.jsonl.zst` is read as `.jsonl`.
"""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from orchestrator.data.blocks import DataError
from slimllm_ops.files import open_plain, read_plain

RUNNING = (".txt", ".md")
LINES = ".jsonl"
OBJECTS = ".json"
# Separated values, below a line of columns.
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
ARROW = ".arrow"
ROWS = (LINES, OBJECTS, *SEPARATORS)
TEXT = (*RUNNING, *ROWS)
TABLES = (PARQUET, ARROW)
SUFFIXES = (*TEXT, *TABLES)
# A folder that `datasets.save_to_disk` wrote.
SAVED = "saved dataset"
_STATE, _SPLITS = "state.json", "dataset_dict.json"


# What decompresses an open file, by the last suffix; each decompresses as much as is read.
_COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".zst": partial(pa.input_stream, compression="zstd"),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
# The largest description of a saved dataset.
_MOST_BYTES = 1 << 24


def form_of(path: Path) -> str:
    """Return the form of a file, one of `SUFFIXES`, or `SAVED` for a folder; another suffix if it has none of them."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSED:
        inner = suffixes[0] if len(suffixes) > 1 else ""
        return inner if inner in TEXT else "".join(suffixes)
    if (path / _STATE).is_file():
        return SAVED
    return suffixes[-1] if suffixes else ""


def described(path: Path) -> str:
    """Return what a file should be, for errors: "UTF-8 text", "a whole parquet file"."""
    form = form_of(path)
    if form == SAVED:
        return "a whole folder of save_to_disk"
    if form not in TEXT:
        return f"a whole {form[1:]} file"
    last = path.suffix.lower()
    return f"UTF-8 text in a whole {last} file" if last in _COMPRESSED else "UTF-8 text"


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file of text, compressed or not; a mark of the byte order is skipped."""
    with open_plain(path) as plain, _COMPRESSED.get(path.suffix.lower(), nullcontext)(plain) as opened:
        yield io.TextIOWrapper(opened, encoding="utf-8-sig")


def saved_dataset(folder: Path) -> Path | None:
    """Return the folder of a dataset that `save_to_disk` wrote; of several splits, the one for training.

    Raises:
        DataError: There are several splits, and none is called "train".
    """
    if (folder / _STATE).is_file():
        return folder
    if not (folder / _SPLITS).is_file():
        return None
    splits = [str(split) for split in _read_json(folder / _SPLITS).get("splits") or []]
    chosen = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
    if chosen is None or not (folder / chosen / _STATE).is_file():
        raise DataError(
            f"{folder} is a dataset of the splits {', '.join(splits) or '(none)'}: name the folder of one of them"
        )
    return folder / chosen


def table_files(path: Path) -> list[Path]:
    """Return the files that make up a table, in order: the file itself, or those that a saved dataset lists.

    Raises:
        DataError: The saved dataset keeps a selection of its rows apart.
    """
    if form_of(path) != SAVED:
        return [path]
    state = _read_json(path / _STATE)
    if state.get("_indices_data_files"):
        raise DataError(f"{path} keeps a selection of its rows apart: call flatten_indices(), and save it again")
    return [path / Path(str(file["filename"])).name for file in state["_data_files"]]


def _read_json(path: Path) -> dict[str, Any]:
    read = json.loads(read_plain(path, _MOST_BYTES).decode("utf-8"))
    if not isinstance(read, dict):
        raise TypeError(f"{path.name} is not an object")
    return read
