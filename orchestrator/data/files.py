"""Local files: which one a spec names, the columns of a table, and rows of token ids."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.data.blocks import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<config>[^:]+))?(:(?P<split>[^:]+))?")
_ROWS_PER_BATCH = 1024


def local_file(spec: str) -> Path | None:
    """The file that the spec names; None for a built-in text and for what can only be a name on the hub."""
    if spec.startswith("builtin:"):
        return None
    path = Path(spec).expanduser()
    if path.is_dir():
        raise DataError(f"{spec!r} is a directory: name one file in it ({', '.join(SUFFIXES)})")
    if not path.exists():
        if path.suffix in SUFFIXES or not HUB_NAME.fullmatch(spec):
            raise DataError(f"{spec}: no such file: check the path, or use builtin:calibration, builtin:heldout")
        return None
    if path.suffix not in SUFFIXES:
        raise DataError(f"{spec}: files of type {path.suffix!r} are not known: use {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{spec}: the file is empty: give one with text or token blocks")
    return path


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says which file could not be read, in one line."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "UTF-8 text" if path.suffix in (".txt", ".jsonl") else f"a whole {path.suffix[1:]} file"
        raise DataError(f"{path}: not readable as {kind} ({one_line(error)}): write it again") from error


def one_line(error: Exception) -> str:
    """What an error of someone else's says, in its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def table_columns(path: Path) -> list[str]:
    """The columns of a table; none for other files."""
    if path.suffix not in (".parquet", ".arrow"):
        return []
    with explained(path):
        return (pq.read_schema(path) if path.suffix == ".parquet" else _open_arrow(path).schema).names


def read_column(path: Path, name: str) -> Iterator[pa.Array]:
    """The arrays of one column of a table, batch by batch, mapped into memory where they are in Arrow."""
    with explained(path):
        if path.suffix == ".parquet":
            batches: Iterable[pa.RecordBatch] = pq.ParquetFile(path).iter_batches(_ROWS_PER_BATCH, columns=[name])
        else:
            reader = _open_arrow(path)
            whole = isinstance(reader, pa.RecordBatchFileReader)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
        for batch in batches:
            yield batch.column(name)


def _open_arrow(path: Path) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(path)))


def read_rows(path: Path) -> np.ndarray:
    """The rows of ``input_ids``, without a copy where they are one uncompressed Arrow batch."""
    arrays = list(read_column(path, "input_ids"))
    rows = sum(len(array) for array in arrays)
    if not rows:
        raise DataError(f"{path}: 'input_ids' has no rows: give at least one block")
    kind = arrays[0].type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise DataError(f"{path}: 'input_ids' holds {kind}: store lists of integers, all of one length")
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


def _check_no_nulls(path: Path, arrays: list[pa.Array]) -> None:
    first = 0
    for array in arrays:
        if array.null_count or array.flatten().null_count:
            row = next(n for n, row in enumerate(array.to_pylist(), start=first) if row is None or None in row)
            raise DataError(f"{path}: row {row} of 'input_ids' is or holds null: drop or mend such rows")
        first += len(array)
