"""Rows of token ids are used unchanged, and saved blocks are read back unchanged."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.data import DataError, TokenBlocks, save_blocks
from tests.orchestrator.data.sample_files import DOCUMENTS, write_jsonl, write_rows, write_table

ROWS = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 102]]
INTEGERS = [pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64()]
LISTS = {"list": pa.list_, "large": pa.large_list, "fixed": lambda kind: pa.list_(kind, 3)}


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.stream.arrow"])
@pytest.mark.parametrize("make_list", LISTS.values(), ids=LISTS)
def test_token_rows_are_taken_as_they_are(
    tmp_path: Path, load: Callable, name: str, make_list: Callable[[pa.DataType], pa.DataType]
) -> None:
    for kind in INTEGERS:
        path = write_rows(tmp_path / name, ROWS, make_list(kind))
        blocks = load(path, model_dir=tmp_path, samples=1, sequence_length=2, seed=3)
        np.testing.assert_array_equal(blocks.input_ids_BT, ROWS)
        assert blocks.input_ids_BT.dtype == np.int32
        assert blocks.input_ids_BT.flags.c_contiguous
        assert blocks.found == 4
        assert blocks.source_digest is None


def test_tokens_win_over_text(tmp_path: Path, load: Callable) -> None:
    path = write_table(tmp_path / "x.parquet", text=["w1", "w2"], input_ids=[[5, 6], [7, 8]])
    assert load(path).input_ids_BT.tolist() == [[5, 6], [7, 8]]


def test_saved_blocks_come_back_the_same(tmp_path: Path, load: Callable) -> None:
    drawn = load(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), samples=9)
    saved = tmp_path / "saved.arrow"
    save_blocks(drawn, saved)
    back = load(saved)
    np.testing.assert_array_equal(back.input_ids_BT, drawn.input_ids_BT)
    assert back.digest == drawn.digest
    assert pa.ipc.open_file(saved).schema.field("input_ids").type == pa.list_(pa.int32(), 8)
    save_blocks(back, saved)  # onto the file that it is mapped from
    assert load(saved).digest == back.digest == drawn.digest
    np.testing.assert_array_equal(back.input_ids_BT, drawn.input_ids_BT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved.arrow", "x.jsonl"]


def test_saved_blocks_are_mapped_not_copied(tmp_path: Path, load: Callable) -> None:
    ids = np.arange(1 << 20, dtype=np.int32).reshape(-1, 64)
    save_blocks(TokenBlocks("x", ids, digest="", found=len(ids)), tmp_path / "x.arrow")
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    blocks = load(tmp_path / "x.arrow", vocab_size=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert blocks.input_ids_BT.nbytes == 1 << 22
    assert peak < 1 << 20
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_blocks_are_saved_under_a_name_that_can_be_loaded(tmp_path: Path) -> None:
    blocks = TokenBlocks("x", np.zeros((1, 2), np.int32), digest="", found=1)
    with pytest.raises(DataError, match=r"name it x\.arrow"):
        save_blocks(blocks, tmp_path / "x.bin")


def test_the_digest_is_of_shape_and_content_only(tmp_path: Path, load: Callable) -> None:
    narrow = load(write_rows(tmp_path / "a.parquet", ROWS, pa.list_(pa.uint16())))
    wide = load(write_rows(tmp_path / "b.arrow", ROWS, pa.list_(pa.int64(), 3)))
    assert narrow.digest == wide.digest
    assert len(narrow.digest) == 64
    other_shape = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 102]]
    other_content = [*ROWS[:3], [10, 11, 101]]
    digests = {load(write_rows(tmp_path / "c.arrow", rows)).digest for rows in (other_shape, other_content)}
    assert len(digests | {narrow.digest}) == 3
