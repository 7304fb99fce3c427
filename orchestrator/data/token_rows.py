"""Reads rows of token ids, which are blocks already; what an `attention_mask` leaves out becomes padding.

A row keeps the tokens whose mask is 1. They must stand side by side: padding may be on the left or on the right, and
the tokens of a row count their positions from the first one. Rows of different lengths are padded to the longest.

Shapes: R rows of T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.blocks import DataError, check_vocabulary
from orchestrator.data.forms import ROWS, form_of
from orchestrator.data.tables import read_columns, table_columns
from orchestrator.data.text_rows import read_text_rows
from slimllm_ops.errors import shown
from slimllm_ops.stream.padding import PADDING

# Limit on the token ids of a table: 1 GB in memory, and far more than a calibration needs.
MOST_IDS = 1 << 28
IDS, MASK = "input_ids", "attention_mask"
# The ids of a file of text that become an array at once.
IDS_AT_ONCE = 1 << 20
_LISTS = pa.large_list(pa.int64())


def has_token_rows(path: Path) -> bool:
    """Return whether a file or folder holds rows of token ids, by its columns or by its first row.

    Raises:
        DataError: The first row cannot be read.
    """
    if form_of(path) in ROWS:
        return any(IDS in row for _, row in islice(read_text_rows(path), 1))
    return IDS in table_columns(path)


def read_rows(spec: str, path: Path, vocab_size: int) -> np.ndarray:
    """Return the rows of token ids of a table or of a file of rows, with `PADDING` after the tokens of shorter ones.

    There is no copy if the rows are one uncompressed Arrow batch without padding.

    Raises:
        DataError: They are no lists of ids of this vocabulary, or the masks do not fit them.
    """
    parts = list(_parts(path))
    rows = sum(len(part.counts) for part in parts)
    if not rows:
        raise DataError(f"{path}: 'input_ids' has no rows: give at least one block")
    for part in parts:
        check_vocabulary(spec, part.ids, vocab_size, part.row_of)
    length = max(int(part.counts.max(initial=0)) for part in parts)
    if all((part.counts == length).all() for part in parts):
        ids = parts[0].ids if len(parts) == 1 else np.concatenate([part.ids for part in parts])
        return ids.reshape(rows, length)
    if rows * length > MOST_IDS:
        raise DataError(
            f"{path}: {rows:,} rows padded to {length:,} tokens are too many: cut the longest, or drop rows"
        )
    ids_RT = np.full((rows, length), PADDING, dtype=np.int32)
    for part in parts:
        tokens_RT = np.arange(length) < part.counts[:, None]
        ids_RT[part.first : part.first + len(part.counts)][tokens_RT] = part.ids
    return ids_RT


@dataclass(frozen=True)
class _Part:
    """The tokens of some rows, without padding: their ids in order, how many each row has, and the first row."""

    ids: np.ndarray
    counts: np.ndarray
    first: int

    def row_of(self, position: int) -> int:
        """Return the row of the token at a position of `ids`."""
        return self.first + int(np.searchsorted(np.cumsum(self.counts), position, side="right"))


def _parts(path: Path) -> Iterator[_Part]:
    first, num_ids = 0, 0
    for array, *masks in _arrays(path):
        _check_lists(path, array, IDS, "integers", (pa.types.is_integer,))
        # A few bytes can encode very many rows.
        num_ids += len(array) + len(array.flatten())
        if num_ids > MOST_IDS:
            raise DataError(f"{path}: more than {MOST_IDS:,} token ids: give fewer rows")
        _check_no_nulls(path, array, IDS, first)
        ids = array.flatten().to_numpy(zero_copy_only=True)
        part = _Part(ids, pc.list_value_length(array).to_numpy(), first)
        for mask in masks:
            part = _masked(path, part, mask)
        if (empty := np.flatnonzero(part.counts == 0)).size:
            raise DataError(
                f"{path}: row {first + empty[0]} of 'input_ids' holds no tokens: give one at least, or drop it"
            )
        yield part
        first += len(array)


def _arrays(path: Path) -> Iterator[list[pa.Array]]:
    """Yield the ids of some rows, and the masks if there are any."""
    if form_of(path) not in ROWS:
        yield from read_columns(path, [IDS, MASK] if MASK in table_columns(path) else [IDS])
        return
    names: list[str] = []
    held: list[list[np.ndarray]] = []
    num_ids = 0
    for where, row in read_text_rows(path):
        names = names or [name for name in (IDS, MASK) if name in row]
        held.append([_listed(where, row, name, names) for name in names])
        num_ids += 1 + held[-1][0].size
        if num_ids > IDS_AT_ONCE:
            yield _in_columns(held)
            held, num_ids = [], 0
    if held:
        yield _in_columns(held)


def _in_columns(rows: list[list[np.ndarray]]) -> list[pa.Array]:
    return [pa.array(column, _LISTS) for column in zip(*rows, strict=True)]


def _listed(where: str, row: dict[str, Any], name: str, names: list[str]) -> np.ndarray:
    """Return a row's ids or mask, after checking that it has the columns that the first row has."""
    if differs := {IDS, MASK} & row.keys() ^ set(names):
        has = "has no" if differs - row.keys() else "has an"
        raise DataError(f"{where} {has} {min(differs)!r}, unlike the first row: give all rows the same columns")
    values, kinds = row[name], (int,) if name == IDS else (int, bool)
    # Arrow would take 1.5 for 1.
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        what = "integers" if name == IDS else "0 and 1"
        raise DataError(f"{where}: {name!r} is no list of {what}: give one, or drop the row")
    if not all(abs(value) < 1 << 63 for value in values):
        raise DataError(f"{where}: {name!r} holds a number that is no token id: fix or drop the row")
    return np.array(values, dtype=np.int64)


def _masked(path: Path, part: _Part, mask: pa.Array) -> _Part:
    """Return the tokens of rows without those that the rows' masks leave out."""
    _check_lists(path, mask, MASK, "0 and 1", (pa.types.is_integer, pa.types.is_boolean))
    _check_no_nulls(path, mask, MASK, part.first)
    lengths = pc.list_value_length(mask).to_numpy()
    if (differs := np.flatnonzero(lengths != part.counts)).size:
        row = differs[0]
        raise DataError(
            f"{path}: row {part.first + row} has {part.counts[row]} tokens and an 'attention_mask' of {lengths[row]}: "
            f"give a mask as long as its row"
        )
    values = mask.flatten().to_numpy(zero_copy_only=False)
    keep = values == 1
    if (wrong := np.flatnonzero(~keep & (values != 0))).size:
        raise DataError(
            f"{path}: row {part.row_of(wrong[0])} has {values[wrong[0]]} in its 'attention_mask': "
            f"write 1 for a token and 0 for padding"
        )
    if keep.all():
        return part
    rows = np.repeat(np.arange(len(part.counts)), part.counts)
    counts = np.bincount(rows[keep], minlength=len(part.counts))
    _check_no_holes(path, part, keep, rows)
    return _Part(part.ids[keep], counts, part.first)


def _check_no_holes(path: Path, part: _Part, keep: np.ndarray, rows: np.ndarray) -> None:
    """Raise DataError if a row has padding between its tokens."""
    kept, kept_rows = np.flatnonzero(keep), rows[keep]
    if (holes := np.flatnonzero((np.diff(kept) > 1) & (np.diff(kept_rows) == 0))).size:
        raise DataError(
            f"{path}: row {part.first + kept_rows[holes[0]]} has padding between its tokens (a mask of 1, 0, 1): "
            f"keep the tokens of a row together, or drop it"
        )


def _check_lists(path: Path, array: pa.Array, name: str, described: str, kinds: tuple) -> None:
    kind = array.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not any(fits(kind.value_type) for fits in kinds):
        raise DataError(f"{path}: {name!r} holds {shown(str(kind))}: store lists of {described}")


def _check_no_nulls(path: Path, array: pa.Array, name: str, first: int) -> None:
    if array.null_count or array.flatten().null_count:
        row = next(n for n, row in enumerate(array.to_pylist(), start=first) if row is None or None in row)
        raise DataError(f"{path}: row {row} of {name!r} is or holds null: drop or fix such rows")
