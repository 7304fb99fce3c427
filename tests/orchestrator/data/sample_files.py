"""Files of text and tokens, and the blocks that a naive reference makes from them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import DataError

VOCAB_SIZE = 103
DOCUMENTS = [" ".join(f"w{(7 * d + i) % 100}" for i in range(5 + d % 4)) for d in range(40)]


def naive_ids(documents: list[str]) -> list[int]:
    return [token for text in documents for token in [1, *(int(word[1:]) + 3 for word in text.split())]]


def naive_blocks(ids: list[int], length: int) -> np.ndarray:
    return np.array([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])


def assert_refused(load: Callable[[Path], Any], path: Path, said: str) -> None:
    """Check that a file cannot be loaded, and that one line says why and names it."""
    with pytest.raises(DataError, match=said) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def write_jsonl(path: Path, documents: Sequence[str | None]) -> Path:
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)))
    return path


def write_table(path: Path, **columns: Any) -> Path:
    """Writes the kind of file that the suffixes say; ``x.stream.arrow`` is a stream of two batches."""
    table = pa.table(columns)
    if path.suffix in (".jsonl", ".json"):
        rows = table.to_pylist()
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffixes[:1] == [".stream"]:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=max(1, (len(table) + 1) // 2))
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    return path


def write_rows(path: Path, rows: Sequence[Sequence[int]], kind: pa.DataType | None = None) -> Path:
    return write_table(path, input_ids=pa.array(rows, kind or pa.list_(pa.int32())))


def source(path: Path, documents: list[str]) -> Path:
    return write_jsonl(path, documents) if path.suffix == ".jsonl" else write_table(path, text=documents)


TEXT_FILES = ["x.jsonl", "x.parquet", "x.arrow", "x.stream.arrow"]
