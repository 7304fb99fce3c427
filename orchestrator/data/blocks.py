"""Defines token blocks: how they are drawn, their digest, and the file they are saved in."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrator.config import PruneConfig


class DataError(ValueError):
    """An unusable text or token source; the message says what was asked, what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for drawing blocks from a text; token files are used whole.

    Attributes:
        samples: Number of blocks to keep; a text with fewer gives all of them.
        sequence_length: Maximum tokens per block; a model with a lower limit shortens the blocks.
        seed: Seed that chooses the kept blocks.
    """

    samples: int = PruneConfig.samples
    sequence_length: int = PruneConfig.sequence_length
    seed: int = PruneConfig.seed

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("sequence_length", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise DataError(f"{name} is {value}: give at least {least}")


@dataclass(frozen=True)
class TokenBlocks:
    """Token blocks and their source.

    Attributes:
        spec: The source, as the user named it.
        input_ids_BT: The token ids: int32, C-contiguous and read-only (possibly a memory-mapped file).
        digest: sha256 of only the shape and the bytes of ``input_ids_BT``.
        found: Number of blocks that were available; if there were fewer than ``samples``, all were taken.
        source_digest: sha256 of the text that was read, independent of the tokenizer; None for token files.
    """

    spec: str
    input_ids_BT: np.ndarray = field(repr=False, compare=False)
    digest: str
    found: int
    source_digest: str | None = None


def freeze(spec: str, ids_BT: np.ndarray, found: int, source_digest: str | None) -> TokenBlocks:
    """Return read-only token blocks with their digest, so that no later write can invalidate it."""
    ids_BT = np.ascontiguousarray(ids_BT, dtype=np.int32)
    ids_BT.flags.writeable = False
    digest = hashlib.sha256("{}x{}\n".format(*ids_BT.shape).encode())
    digest.update(ids_BT.astype("<i4", copy=False).reshape(-1).data)
    return TokenBlocks(spec, ids_BT, digest.hexdigest(), found, source_digest)


def check_fits(spec: str, ids_BT: np.ndarray, vocab_size: int, max_length: int) -> None:
    """Raise DataError unless a model with this vocabulary and sequence length can take the blocks."""
    length = ids_BT.shape[1]
    if length > max_length:
        raise DataError(f"{spec}: blocks of {length} tokens, the model takes {max_length}: cut them shorter")
    low, high = int(ids_BT.min()), int(ids_BT.max())
    if low >= 0 and high < vocab_size:
        return
    worst, position = (high, ids_BT.argmax()) if high >= vocab_size else (low, ids_BT.argmin())
    raise DataError(
        f"{spec}: token id {worst} in row {int(position) // length}, the model's vocabulary has {vocab_size} "
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
    values = pa.array(blocks.input_ids_BT.reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(values, blocks.input_ids_BT.shape[1])
    batch = pa.record_batch([rows], names=["input_ids"])
    # Replace the file, do not overwrite it: the blocks may be mapped from it, and truncating it kills the process.
    partial = path.with_name(path.name + ".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)
