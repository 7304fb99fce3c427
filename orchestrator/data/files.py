"""Finds the file that a spec names, and reads the columns of tables and rows of token ids."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.data.blocks import DataError
from orchestrator.sources import storage
from slimllm_ops.errors import shown

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<config>[^:]+))?(:(?P<split>[^:]+))?")
_ROWS_PER_BATCH = 1024
_BATCH_BYTES = 1 << 26
# Limit on the token ids of a table: 1 GB in memory, and far more than a calibration needs.
MOST_IDS = 1 << 28
# Limit on the characters of a document: its tokenized form takes a hundred times as many bytes.
LONGEST_DOCUMENT = 1 << 25
_MOST_NAMES = 10


def local_file(spec: str) -> Path | None:
    """Return the local file, or the local copy of a URI's file; None for built-in texts and names of hub datasets."""
    if spec.startswith("builtin:"):
        return None
    return _fetched_file(spec) if storage.is_uri(spec) else _file_here(spec)


def _fetched_file(uri: str) -> Path:
    """Return the local copy of a file in a store."""
    try:
        _require_known_suffix(uri, Path(storage.name_of(uri)))
        path = storage.fetch_file(uri)
    except storage.StorageError as error:
        raise DataError(str(error)) from error
    _require_content(uri, path)
    return path


def _file_here(spec: str) -> Path | None:
    try:
        path = Path(spec).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    # Path.expanduser raises RuntimeError if "~name" is not a user's home.
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{shown(spec)}: not a readable path ({reason}): check it") from error
    if is_directory:
        raise DataError(f"{spec!r} is a directory: name one file in it ({', '.join(SUFFIXES)})")
    if not exists:
        if path.suffix in SUFFIXES or not HUB_NAME.fullmatch(spec):
            raise DataError(f"{spec}: no such file: check the path, or use builtin:calibration, builtin:heldout")
        return None
    _require_known_suffix(spec, path)
    _require_content(spec, path)
    return path


def _require_known_suffix(spec: str, path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{spec}: unknown file type {path.suffix!r}: use {', '.join(SUFFIXES)}")


def _require_content(spec: str, path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{spec}: the file is empty: give one with text or token blocks")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn any error in reading a file into a one-line DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    # Catch everything: for a broken file, pyarrow raises many kinds of errors.
    except Exception as error:
        kind = "UTF-8 text" if path.suffix in (".txt", ".jsonl") else f"a whole {path.suffix[1:]} file"
        raise DataError(f"{path}: not readable as {kind} ({error_line(error)}): write it again") from error


def error_line(error: BaseException) -> str:
    """Return the type and the first line of a library's error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shown(lines[0], 200)}" if lines else type(error).__name__


def list_names(names: Iterable[str]) -> str:
    """Return the first few names, each cut to a readable length."""
    names = list(names)
    return ", ".join(map(shown, names[:_MOST_NAMES])) + (", ..." if len(names) > _MOST_NAMES else "")


def table_columns(path: Path) -> list[str]:
    """Return the names of a table's columns; an empty list for other files."""
    if path.suffix not in (".parquet", ".arrow"):
        return []
    with naming_file(path):
        return (pq.read_schema(path) if path.suffix == ".parquet" else _open_arrow(path).schema).names


def read_column(path: Path, name: str) -> Iterator[pa.Array]:
    """Yield the arrays of one column of a table, batch by batch; Arrow files are mapped into memory."""
    with naming_file(path):
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            batches: Iterable[pa.RecordBatch] = file.iter_batches(_rows_at_once(file.metadata), columns=[name])
        else:
            reader = _open_arrow(path)
            whole = isinstance(reader, pa.RecordBatchFileReader)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
        for batch in batches:
            array = batch.column(name)
            # Offsets of a broken file may point anywhere: following them unchecked crashes the process.
            array.validate(full=True)
            yield array


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    """Return how many rows to read at once; fewer if they are large."""
    num_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return max(1, min(_ROWS_PER_BATCH, _BATCH_BYTES * max(metadata.num_rows, 1) // max(num_bytes, 1)))


def _open_arrow(path: Path) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(path)))


def read_rows(path: Path) -> np.ndarray:
    """Return the rows of ``input_ids``, without a copy if they are one uncompressed Arrow batch."""
    arrays = _read_id_lists(path)
    rows = sum(len(array) for array in arrays)
    if not rows:
        raise DataError(f"{path}: 'input_ids' has no rows: give at least one block")
    _check_no_nulls(path, arrays)
    lengths = np.concatenate([pc.list_value_length(array).to_numpy() for array in arrays])
    if (differs := np.flatnonzero(lengths != lengths[0])).size:
        raise DataError(
            f"{path}: row 0 has {lengths[0]} tokens and row {differs[0]} has {lengths[differs[0]]}: "
            "cut or drop rows so that all have one length"
        )
    if not lengths[0]:
        raise DataError(f"{path}: the rows of 'input_ids' hold no tokens: give at least one per row")
    parts = [array.flatten().to_numpy(zero_copy_only=True) for array in arrays]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(rows, lengths[0])


def _read_id_lists(path: Path) -> list[pa.Array]:
    """Return the arrays of ``input_ids``; refuse any that are not lists of integers, or too many for memory."""
    arrays, num_ids = [], 0
    for array in read_column(path, "input_ids"):
        kind = array.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise DataError(f"{path}: 'input_ids' holds {shown(str(kind))}: store lists of integers, all of one length")
        arrays.append(array)
        # A few bytes can encode very many rows.
        num_ids += len(array) + len(array.flatten())
        if num_ids > MOST_IDS:
            raise DataError(f"{path}: more than {MOST_IDS:,} token ids: give fewer rows")
    return arrays


def _check_no_nulls(path: Path, arrays: list[pa.Array]) -> None:
    first = 0
    for array in arrays:
        if array.null_count or array.flatten().null_count:
            row = next(n for n, row in enumerate(array.to_pylist(), start=first) if row is None or None in row)
            raise DataError(f"{path}: row {row} of 'input_ids' is or holds null: drop or fix such rows")
        first += len(array)
