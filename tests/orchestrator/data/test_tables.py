"""Tables of a few bytes that stand for very many are refused, or read in little memory."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import tables
from orchestrator.data.blocks import DataError
from orchestrator.data.documents import read_documents
from orchestrator.data.ipc_sizes import size_of_batches
from orchestrator.data.tables import read_columns
from orchestrator.data.token_rows import read_rows

LONG = "a" * 500_000


def documents(path: Path) -> list[str]:
    return [one.text for one in read_documents(str(path), path, lambda messages, tools, where: str(len(messages)))]


def lists(values: pa.Array, *lengths: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)


def views(length: int, times: int) -> pa.Array:
    """Many views of one string."""
    view = struct.pack("<i4sii", length, b"aaaa", 0, 0)
    return pa.Array.from_buffers(
        pa.string_view(), times, [None, pa.py_buffer(view * times), pa.py_buffer(b"a" * length)]
    )


def laughs(depth: int, times: int) -> pa.Array:
    """Lists of lists, each of which holds the same one many times."""
    values = pa.array(["ha"])
    for _ in range(depth):
        values = lists(pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), values), times)
    return values


def parquet(**settings: Any) -> Callable[[Path, str, Any], None]:
    return lambda path, name, values: pq.write_table(pa.table({name: values}), path, compression="zstd", **settings)


def arrow(path: Path, name: str, values: Any) -> None:
    batch = pa.record_batch({name: values})
    with pa.ipc.new_file(str(path), batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)


def test_a_text_that_a_dictionary_names_once_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet()(path, "text", pa.array([LONG] * 1024).dictionary_encode())
    assert path.stat().st_size < 1000
    held = [array.nbytes for arrays in read_columns(path, ["text"]) for array in arrays]
    assert sum(held) < 2 * len(LONG)
    assert next(iter(read_documents(str(path), path, str))).text == LONG


@pytest.mark.parametrize(
    ("suffix", "write", "name", "values", "said"),
    [
        # A page of zeros.
        (
            *(".parquet", parquet(use_dictionary=False), "text", lambda: ["a" * (1 << 27)]),
            "'text' grows from .* to 134,217,7.. bytes when it is decompressed",
        ),
        (".arrow", arrow, "text", lambda: [LONG] * 300, "'batch 0' grows from .* to 150,00., *"),
        (".arrow", arrow, "text", lambda: pa.array([LONG * 300]).dictionary_encode(), "'batch 0' grows"),
        # A run of one id, in one row.
        (
            *(".parquet", parquet(), "input_ids", lambda: lists(pa.array(np.zeros(1 << 25, np.int32)), 1 << 25)),
            "'input_ids.list.element' has 33,554,432 values in .* bytes",
        ),
        # A row of very many messages.
        (
            *(".parquet", parquet(), "messages", lambda: [[{"role": "user", "content": LONG}] * 300]),
            "row 0 of 'messages' takes more than 134,217,728 bytes",
        ),
        (".arrow", arrow, "messages", lambda: lists(pa.nulls(1 << 28), 1 << 28), "row 0 of 'messages' takes more"),
        (".arrow", arrow, "messages", lambda: lists(views(1 << 20, 200), 200), "row 0 of 'messages' takes more"),
        (".arrow", arrow, "messages", lambda: laughs(6, 100), "'messages' holds dictionary<.*: store text"),
    ],
)
def test_few_bytes_that_become_very_many_are_refused(
    tmp_path: Path, suffix: str, write: Callable[..., None], name: str, values: Callable[[], Any], said: str
) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, name, values())
    assert path.stat().st_size < 1 << 21
    with pytest.raises(DataError, match=said):
        read_rows(str(path), path, 97) if name == "input_ids" else documents(path)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_texts_that_begin_like_the_one_before_are_read_one_by_one(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{LONG}{number}" for number in range(3)]
    parquet(use_dictionary=False, column_encoding={"text": encoding})(path, "text", texts)
    assert [len(arrays[0]) for arrays in read_columns(path, ["text"])] == [1, 1, 1]
    assert documents(path) == texts


def test_messages_of_that_encoding_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    encoding = {"messages.list.element.content": "DELTA_BYTE_ARRAY"}
    parquet(use_dictionary=False, column_encoding=encoding)(path, "messages", [[{"content": "a"}]])
    with pytest.raises(DataError, match=r"'messages.list.element.content' is stored as DELTA.*: store it plainly"):
        documents(path)


def test_a_mask_of_ones_is_as_long_as_its_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_FEW_VALUES", 1 << 10)
    path, rows = tmp_path / "a.parquet", 1 << 9
    ids = np.random.default_rng(0).integers(0, 97, rows << 7).astype(np.int32)
    both = {"input_ids": pa.array(ids), "attention_mask": pa.array(np.ones(len(ids), np.int8))}
    table = {name: lists(values, *[1 << 7] * rows) for name, values in both.items()}
    pq.write_table(pa.table(table), path)
    assert (read_rows(str(path), path, 97).reshape(-1) == ids).all()
    longer = lists(pa.array(np.ones(2 * len(ids), np.int8)), *[1 << 8] * rows)
    pq.write_table(pa.table(table | {"attention_mask": longer}), path)
    with pytest.raises(DataError, match=r"'attention_mask.list.element' has 131,072 values in .* bytes"):
        read_rows(str(path), path, 97)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_sizes_of_batches_are_those_that_arrow_allocates(tmp_path: Path, compression: str | None, new: Any) -> None:
    path = tmp_path / "a.arrow"
    batch = pa.record_batch({"text": [LONG, "b", None], "input_ids": [[1, 2], [], [3]]})
    with new(str(path), batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    sizes = list(size_of_batches(path))
    assert len(sizes) == 2
    for stored, read in sizes:
        assert batch.nbytes <= read <= batch.nbytes + 500
        assert (stored < 5000) == (compression is not None)


def test_values_are_what_arrow_makes_of_them(tmp_path: Path) -> None:
    array = pa.array([[{"a": "x", "b": [1, None]}], None, []])
    assert list(tables.python_values(tmp_path, "a", array, 0)) == array.to_pylist()
    for kind in (pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        array = pa.array(["a", None, "b" * 100], pa.string()).cast(kind)
        assert list(tables.python_values(tmp_path, "a", array[1:], 0)) == [None, "b" * 100]
