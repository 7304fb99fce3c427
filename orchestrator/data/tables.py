"""Reads the columns of tables in bounded memory, whatever their files hold.

A few bytes can stand for very many: a text that a dictionary names once and rows a million times, a run of one value,
compressed zeros. So what a batch takes is measured before it is read, as far as the file says it, and what a row takes
before it becomes Python's objects.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.data.blocks import DataError
from orchestrator.data.files import LONGEST_DOCUMENT, naming_file
from orchestrator.data.forms import PARQUET, SAVED, TABLES, form_of, table_files
from orchestrator.data.ipc_sizes import size_of_batches
from slimllm_ops.errors import shown
from slimllm_ops.files import require_plain

_ROWS_PER_BATCH = 1024
_BATCH_BYTES = 1 << 26
# How many bytes a stored byte may become. Text is compressed to a third or a tenth.
_MOST_GROWTH = 64
# Limits on the values of a column in one row group, and on those that a byte may stand for, above some millions.
_MOST_VALUES, _MOST_VALUES_PER_BYTE, _FEW_VALUES = 1 << 28, 64, 1 << 24
# A row of a document, in bytes and values.
_LARGEST_ROW = 4 * LONGEST_DOCUMENT
# A value may begin like the one before, so a few bytes stand for many, and Arrow reads these as no dictionaries.
_INCREMENTAL = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}


def table_columns(path: Path) -> list[str]:
    """Return the names of a table's columns; an empty list for other files."""
    if form_of(path) not in (*TABLES, SAVED):
        return []
    with naming_file(path):
        first = table_files(path)[0]
        require_plain(first)
        return (pq.read_schema(first) if form_of(first) == PARQUET else _open_arrow(first).schema).names


def read_columns(path: Path, names: list[str]) -> Iterator[list[pa.Array]]:
    """Yield the arrays of a table's columns, batch by batch; Arrow files are mapped into memory.

    Text in Parquet files comes as dictionaries, because one text may stand in very many rows.
    """
    with naming_file(path):
        for file in table_files(path):
            require_plain(file)
            for batch in (_parquet_batches if form_of(file) == PARQUET else _arrow_batches)(file, names):
                arrays = [batch.column(name) for name in names]
                for array in arrays:
                    # Offsets of a broken file may point anywhere: following them unchecked crashes the process.
                    array.validate(full=True)
                yield arrays


def python_values(path: Path, name: str, array: pa.Array, first: int) -> Iterator[Any]:
    """Yield the values of a column as Python's objects.

    Args:
        path: The file, for errors.
        name: The column, for errors.
        array: The values of some rows.
        first: The number of the first of these rows.

    Raises:
        DataError: A value is larger than a document, or of a kind that can hide its size.
    """
    with naming_file(path):
        small = _weight(path, name, array) <= _LARGEST_ROW
    for row in range(len(array)):
        if not small and _weight(path, name, array.slice(row, 1)) > _LARGEST_ROW:
            raise DataError(
                f"{path}: row {first + row} of {name!r} takes more than {_LARGEST_ROW:,} bytes: split it into several"
            )
        yield array[row].as_py()


def _weight(path: Path, name: str, array: pa.Array) -> int:
    """Return about how many bytes and values an array becomes as Python's objects."""
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return len(array) + _weight(path, name, array.flatten())
    if pa.types.is_struct(kind):
        return len(array) + sum(_weight(path, name, array.field(number)) for number in range(kind.num_fields))
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return len(array) + int(pc.sum(_lengths(array.dictionary).take(array.indices)).as_py() or 0)
    if _is_text(kind):
        return len(array) + int(pc.sum(_lengths(array)).as_py() or 0)
    if pa.types.is_nested(kind) or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        raise DataError(f"{path}: {name!r} holds {shown(str(kind))}: store text, or lists of messages")
    return len(array)


def _lengths(array: pa.Array) -> pa.Array:
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        # Each view begins with its length, and has 16 bytes.
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        return pa.array(views[array.offset : array.offset + len(array), 0], pa.int64())
    return pc.cast(pc.binary_length(array), pa.int64())


def _is_text(kind: pa.DataType) -> bool:
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{check}")(kind) for check in checks)


def _parquet_batches(path: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    metadata = pq.read_metadata(path)
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    read = [number for number, column in enumerate(columns) if column.path.partition(".")[0] in names]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for group in groups:
        _require_small(path, [group.column(number) for number in read], group.num_rows)
    texts = {number for number in read if columns[number].physical_type == "BYTE_ARRAY"}
    whole = {number for number in texts if any(_INCREMENTAL & {*group.column(number).encodings} for group in groups)}
    for number in whole:
        if "." in columns[number].path:
            raise DataError(
                f"{path}: {shown(columns[number].path)!r} is stored as {min(_INCREMENTAL)}: store it plainly"
            )
    dictionaries = [columns[number].path for number in texts - whole]
    file = pq.ParquetFile(path, metadata=metadata, read_dictionary=dictionaries)
    for number, group in enumerate(groups):
        rows = 1 if whole else _rows_at_once([group.column(column) for column in read], group.num_rows)
        yield from file.iter_batches(rows, row_groups=[number], columns=names)


def _require_small(path: Path, chunks: list[Any], num_rows: int) -> None:
    """Check what the columns of a row group become when they are read.

    Raises:
        DataError: One becomes far more than it takes in the file.
    """
    most = max((chunk.num_values for chunk in chunks if not _is_mask(chunk)), default=num_rows)
    for chunk in chunks:
        stored, bytes_read = chunk.total_compressed_size, chunk.total_uncompressed_size
        _require_growth(path, chunk.path_in_schema, stored, bytes_read)
        # A mask has as many values as the ids have, and is often a single run.
        likely = max(_FEW_VALUES, most if _is_mask(chunk) else _MOST_VALUES_PER_BYTE * bytes_read)
        if chunk.num_values > min(_MOST_VALUES, likely):
            raise DataError(
                f"{path}: {shown(chunk.path_in_schema)!r} has {chunk.num_values:,} values in {bytes_read:,} bytes: "
                f"no text and no tokens are so much alike"
            )


def _is_mask(chunk: Any) -> bool:
    return bool(chunk.path_in_schema.startswith("attention_mask."))


def _require_growth(path: Path, what: str, stored: int, read: int) -> None:
    if read > max(_BATCH_BYTES, _MOST_GROWTH * stored):
        raise DataError(
            f"{path}: {shown(what)!r} grows from {stored:,} to {read:,} bytes when it is decompressed, "
            f"as no text and no tokens do: give another file"
        )


def _rows_at_once(chunks: list[Any], num_rows: int) -> int:
    """Return how many rows of a row group to read at once: fewer if they are large."""
    num_bytes = max(sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks), 1)
    return max(1, min(_ROWS_PER_BATCH, _BATCH_BYTES * num_rows // num_bytes))


def _arrow_batches(path: Path, names: list[str]) -> Iterable[pa.RecordBatch]:
    for number, (stored, read) in enumerate(size_of_batches(path)):
        _require_growth(path, f"batch {number}", stored, read)
    reader = _open_arrow(path)
    whole = isinstance(reader, pa.RecordBatchFileReader)
    return map(reader.get_batch, range(reader.num_record_batches)) if whole else reader


def _open_arrow(path: Path) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(path)))
