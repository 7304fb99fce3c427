"""Defines token blocks: how they are drawn, their digest, and the file they are saved in."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from orchestrator.config import PruneConfig
from slimllm_ops.stream.padding import PADDING, count_tokens

T = TypeVar("T")
POOL = 16  # 128 blocks of 2048 are drawn from 4 million tokens: a broad choice, and 5 to 10 s of tokenising


class DataError(ValueError):
    """An unusable text or token source; the message says what was asked, what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for taking blocks from a text.

    Attributes:
        samples: Number of blocks to draw at random; a text with fewer gives all of them. None takes the blocks in the
            order of the text. Token files are used in their order too, and with `samples` whole.
        sequence_length: Maximum tokens per block; a model with a lower limit shortens the blocks.
        seed: Seed that chooses the drawn blocks.
        tokens: Limit on the tokens without `samples`, for texts and token files; one block is taken at least. None
            takes all.
    """

    samples: int | None = PruneConfig.samples
    sequence_length: int = PruneConfig.sequence_length
    seed: int = PruneConfig.seed
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("sequence_length", 1), ("seed", 0), ("tokens", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise DataError(f"{name} is {value}: give at least {least}")

    def most_blocks(self, length: int) -> int | None:
        """Return how many blocks of a length may be taken in order; None for all."""
        return None if self.samples is not None or self.tokens is None else max(1, self.tokens // length)


@dataclass(frozen=True)
class TokenBlocks:
    """Token blocks and their source.

    Attributes:
        spec: The source, as the user named it.
        input_ids_BT: The token ids: int32, C-contiguous and read-only (possibly a memory-mapped file). Blocks that are
            shorter than the others end in `slimllm_ops.stream.padding.PADDING`.
        digest: sha256 of only the shape and the bytes of ``input_ids_BT``.
        found: Number of blocks that were available; if there were fewer than ``samples``, all were taken.
        source_digest: sha256 of the text that was read, independent of the tokenizer; None for token files.
        pinned: The source at the commit that was read, such as "name@commit:config:split"; None if it is not the hub's.
    """

    spec: str
    input_ids_BT: np.ndarray = field(repr=False, compare=False)
    digest: str
    found: int
    source_digest: str | None = None
    pinned: str | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens, without padding."""
        return count_tokens(self.input_ids_BT)


def freeze(
    spec: str, ids_BT: np.ndarray, found: int, source_digest: str | None, pinned: str | None = None
) -> TokenBlocks:
    """Return read-only token blocks with their digest, so that no later write can invalidate it."""
    ids_BT = np.ascontiguousarray(ids_BT, dtype=np.int32)
    ids_BT.flags.writeable = False
    return TokenBlocks(spec, ids_BT, digest_of(ids_BT), found, source_digest, pinned)


def digest_of(*arrays_BT: np.ndarray) -> str:
    """Return the sha256 of the shape and the bytes of arrays of one shape, which are the same on every machine."""
    digest = hashlib.sha256("{}x{}\n".format(*arrays_BT[0].shape).encode())
    for array_BT in arrays_BT:
        digest.update(array_BT.astype(array_BT.dtype.newbyteorder("<"), copy=False).reshape(-1).data)
    return digest.hexdigest()


def draw(items: Iterable[T], samples: int, seed: int) -> tuple[list[T], int]:
    """Return a random subset of the first items, in their order, and how many items were read to draw it."""
    generator = np.random.default_rng(seed)
    kept: dict[int, tuple[int, T]] = {}
    found = 0
    for item in islice(items, POOL * samples):
        slot = found if found < samples else int(generator.integers(found + 1))
        if slot < samples:
            kept[slot] = (found, item)
        found += 1
    return [item for _, item in sorted(kept.values(), key=lambda pair: pair[0])], found


def check_length(spec: str, ids_BT: np.ndarray, max_length: int) -> None:
    """Raise DataError unless a model takes sequences as long as the blocks."""
    if (length := ids_BT.shape[1]) > max_length:
        raise DataError(f"{spec}: blocks of {length} tokens, the model takes {max_length}: cut them shorter")


def check_vocabulary(spec: str, ids: np.ndarray, vocab_size: int, row_of: Callable[[int], int]) -> None:
    """Raise DataError unless a vocabulary has all ids; `row_of` says which row an id's position belongs to."""
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low >= 0 and high < vocab_size:
        return
    worst, position = (high, ids.argmax()) if high >= vocab_size else (low, ids.argmin())
    raise DataError(
        f"{spec}: token id {worst} in row {row_of(int(position))}, the model's vocabulary has {vocab_size} "
        f"(0 to {vocab_size - 1}): use tokens of this model's own tokenizer"
    )


def save_blocks(blocks: TokenBlocks, path: Path) -> None:
    """Write blocks as an Arrow IPC file that ``load_tokens`` maps into memory without a copy.

    Args:
        blocks: The blocks to write.
        path: A file named ``*.arrow``; it is written completely or not at all.

    Raises:
        DataError: The file has another extension, so it could not be read back.
    """
    if path.suffix != ".arrow":
        raise DataError(f"{path}: token blocks are saved as .arrow files: name it {path.stem}.arrow")
    ids_BT, mask_BT = blocks.input_ids_BT, blocks.input_ids_BT != PADDING
    columns = {"input_ids": ids_BT}
    if not mask_BT.all():
        columns = {"input_ids": np.where(mask_BT, ids_BT, 0), "attention_mask": mask_BT.astype(np.int8)}
    lists = [pa.FixedSizeListArray.from_arrays(pa.array(one.reshape(-1)), one.shape[1]) for one in columns.values()]
    batch = pa.record_batch(lists, names=list(columns))
    # Replace the file, do not overwrite it: the blocks may be mapped from it, and truncating it kills the process.
    partial = path.with_name(path.name + ".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)
