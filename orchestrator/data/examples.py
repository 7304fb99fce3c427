"""Turns text, tokens and rows of prompts and responses into examples to train on.

Shapes: B examples of T tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.data import load_tokens
from orchestrator.data.blocks import DataError, TextOptions, TokenBlocks, digest_of, draw
from orchestrator.data.files import local_file
from orchestrator.data.instructions import read_instructions
from orchestrator.data.pinning import pin
from orchestrator.data.sequences import TokenSequence, encode_instructions, pack_sequences
from orchestrator.data.token_rows import MOST_IDS
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.secrets import uris_masked
from orchestrator.sources import storage
from slimllm_ops.stream.padding import PADDING, count_tokens


@dataclass(frozen=True)
class Examples:
    """Token sequences to train on, and which of their tokens count in the loss.

    Attributes:
        spec: The source, as the user named it.
        input_ids_BT: The token ids: int32, C-contiguous and read-only. Sequences that are shorter than the others end
            in `slimllm_ops.stream.padding.PADDING`.
        counted_BT: bool, read-only: True for each token whose prediction counts in the loss. Padding never counts, nor
            does the first token of a sequence, which nothing predicts.
        digest: sha256 of only the shape and the bytes of both arrays.
        pinned: The source at the commit that was read, such as "name@commit:config:split"; None if it is not the hub's.
    """

    spec: str
    input_ids_BT: np.ndarray = field(repr=False, compare=False)
    counted_BT: np.ndarray = field(repr=False, compare=False)
    digest: str
    pinned: str | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens, without padding."""
        return count_tokens(self.input_ids_BT)

    @property
    def num_counted(self) -> int:
        """The number of tokens whose prediction counts in the loss."""
        return int(np.count_nonzero(self.counted_BT))


def load_examples(
    spec: str,
    *,
    model_dir: Path,
    vocab_size: int,
    max_length: int,
    options: TextOptions,
    responses: bool,
    pack: bool = False,
) -> Examples:
    """Load examples to train a model on.

    Args:
        spec: The source, as for `load_tokens`.
        model_dir: The directory with the model's tokenizer.
        vocab_size: The model's vocabulary size; token ids must be below it.
        max_length: The longest sequence that the model takes, in tokens (``max_position_embeddings``).
        options: Which blocks or rows are taken, and after how many tokens rows are cut.
        responses: Whether only responses count. The source must have rows of prompts and responses, as in
            ``orchestrator/data/instructions.py``; rows without any token of a response are left out. Otherwise, all
            tokens of the blocks that `load_tokens` gives count.
        pack: Whether a sequence holds several rows of prompts and responses, each whole and with its own special
            tokens: each row goes into the first sequence with room for it. The attention of a row then sees the rows
            before it in its sequence.

    Returns:
        The examples, at least one.

    Raises:
        DataError: The source, the tokenizer or the tokens cannot be used; the message says why in one line.
    """
    if not responses:
        limits = {"vocab_size": vocab_size, "max_length": max_length}
        blocks = load_tokens(spec, model_dir=model_dir, **limits, options=options)
        return _all_counted(blocks)
    pinned = pin(spec)
    path = local_file(pinned or spec)
    length = min(options.sequence_length, max_length)
    with storage.naming_uri(spec, path, DataError):
        tokenizer = load_tokenizer(spec, model_dir, "add its files")
        instructions = read_instructions(pinned or spec, path, tokenizer)
        sequences = _take(spec, encode_instructions(spec, tokenizer, instructions, vocab_size, length), options)
        if pack:
            sequences = pack_sequences(sequences, length)
        return _freeze(uris_masked(spec), *_pad(spec, sequences), pinned)


def split(examples: Examples, validation: int) -> tuple[Examples, Examples]:
    """Return the examples to train on, and the last ones, which are held out.

    Raises:
        DataError: No example is left to train on.
    """
    total = len(examples.input_ids_BT)
    if not 0 <= validation < total:
        raise DataError(
            f"{examples.spec}: {total:,} examples, and {validation:,} of them held out for validation: "
            f"hold out fewer than {total:,}, or give more data"
        )
    cut = total - validation
    parts = [
        _freeze(examples.spec, examples.input_ids_BT[rows], examples.counted_BT[rows], examples.pinned)
        for rows in (slice(cut), slice(cut, total))
    ]
    return parts[0], parts[1]


def _all_counted(blocks: TokenBlocks) -> Examples:
    counted_BT = blocks.input_ids_BT != PADDING
    counted_BT[:, 0] = False
    if not counted_BT.any():
        raise DataError(f"{blocks.spec}: sequences of one token have nothing to predict: give longer ones")
    return _freeze(blocks.spec, blocks.input_ids_BT, counted_BT, blocks.pinned)


def _take(spec: str, sequences: Iterable[TokenSequence], options: TextOptions) -> list[TokenSequence]:
    """Return the sequences that the options ask for, in order."""
    if options.samples is not None:
        return draw(sequences, options.samples, options.seed)[0]
    taken: list[TokenSequence] = []
    tokens = 0
    for sequence in sequences:
        tokens += len(sequence.ids_n)
        if taken and options.tokens is not None and tokens > options.tokens:
            break
        if tokens > MOST_IDS:
            raise DataError(f"{spec}: more than {MOST_IDS:,} tokens to train on: say how many rows to take")
        taken.append(sequence)
    return taken


def _pad(spec: str, sequences: list[TokenSequence]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and the counted tokens (B, T) of sequences, with padding after those of shorter ones."""
    width = max(len(sequence.ids_n) for sequence in sequences)
    if len(sequences) * width > MOST_IDS:
        raise DataError(
            f"{spec}: {len(sequences):,} rows padded to {width:,} tokens are too many: take fewer, or cut them shorter"
        )
    ids_BT = np.full((len(sequences), width), PADDING, dtype=np.int32)
    counted_BT = np.zeros(ids_BT.shape, dtype=bool)
    for ids_T, counted_T, sequence in zip(ids_BT, counted_BT, sequences, strict=True):
        ids_T[: len(sequence.ids_n)] = sequence.ids_n
        counted_T[: len(sequence.ids_n)] = sequence.counted_n
    return ids_BT, counted_BT


def _freeze(spec: str, ids_BT: np.ndarray, counted_BT: np.ndarray, pinned: str | None) -> Examples:
    """Return read-only examples with their digest, so that no later write can invalidate it."""
    for array_BT in (ids_BT, counted_BT):
        array_BT.flags.writeable = False
    return Examples(spec, ids_BT, counted_BT, digest_of(ids_BT, counted_BT), pinned)
