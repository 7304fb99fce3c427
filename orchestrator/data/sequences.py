"""Turns texts of prompts and responses into sequences of tokens, and puts several of them into one.

Shapes: n tokens of a sequence.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from orchestrator.data.blocks import DataError, check_vocabulary
from orchestrator.data.chats import Span
from orchestrator.data.instructions import Instruction
from orchestrator.data.tokenizer import batches, naming_tokenizer_failure


class TokenSequence(NamedTuple):
    """The token ids (int32) of a sequence, and which of its tokens count in the loss (bool)."""

    ids_n: np.ndarray
    counted_n: np.ndarray


def encode_instructions(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Iterable[tuple[int, Instruction]],
    vocab_size: int,
    length: int,
) -> Iterator[TokenSequence]:
    """Yield the sequences of instructions in order, but for those whose responses are cut away.

    Args:
        spec: The source, for errors.
        tokenizer: The tokenizer.
        instructions: The texts, and the number of the row that each comes from.
        vocab_size: The model's vocabulary size.
        length: The number of tokens after which a sequence is cut.

    Raises:
        DataError: The tokenizer cannot read the texts or is another model's, or nothing is left of any response.
    """
    kept, shortest = 0, None
    for row, whole in _encode(spec, tokenizer, instructions):
        if not whole.counted_n.any():
            continue
        begin = int(whole.counted_n.argmax())
        shortest = begin if shortest is None else min(begin, shortest)
        if begin < length:
            kept += 1
            yield _cut(spec, row, whole, vocab_size, length)
    if shortest is None:
        raise DataError(
            f"{spec}: the tokenizer in {tokenizer.name_or_path} makes no tokens of any response: check both"
        )
    if not kept:
        raise DataError(
            f"{spec}: rows are cut after {length:,} tokens, and no response begins before token {shortest + 1:,}: "
            f"give a longer sequence length, or shorter prompts"
        )


def _cut(spec: str, row: int, whole: TokenSequence, vocab_size: int, length: int) -> TokenSequence:
    """Return the first tokens of a row's sequence, after checking that the vocabulary has them."""
    check_vocabulary(spec, whole.ids_n[:length], vocab_size, lambda _: row)
    return TokenSequence(whole.ids_n[:length], whole.counted_n[:length])


def _encode(
    spec: str, tokenizer: PreTrainedTokenizerBase, instructions: Iterable[tuple[int, Instruction]]
) -> Iterator[tuple[int, TokenSequence]]:
    """Yield the number of each row and its whole sequence."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{spec}: the tokenizer in {tokenizer.name_or_path} does not say which characters a token stands for, so "
            f"the tokens of responses cannot be told: save it as a tokenizer.json"
        )
    failed = f"the tokenizer in {tokenizer.name_or_path} cannot read the text"
    for is_chat, group in groupby(instructions, key=lambda pair: pair[1].is_chat):
        if not is_chat and tokenizer.eos_token_id is None:
            raise DataError(
                f"{spec}: the tokenizer in {tokenizer.name_or_path} names no EOS token, which ends a response: "
                f"set eos_token in its tokenizer_config.json, or give chats"
            )
        for batch in batches(group, lambda pair: len(pair[1].text)):
            with naming_tokenizer_failure(failed, "download its files again"):
                sequences = _tokenise(tokenizer, [instruction for _, instruction in batch], is_chat=is_chat)
            yield from zip((row for row, _ in batch), sequences, strict=True)


def _tokenise(tokenizer: PreTrainedTokenizerBase, batch: list[Instruction], *, is_chat: bool) -> list[TokenSequence]:
    encoded: Any = tokenizer(
        [instruction.text for instruction in batch],
        add_special_tokens=not is_chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # otherwise it warns about texts longer than the model's sequences
    )
    sequences = []
    for ids, places, instruction in zip(encoded["input_ids"], encoded["offset_mapping"], batch, strict=True):
        counted_n = _counted(np.array(places, dtype=np.int64).reshape(-1, 2), instruction.responses)
        ids_n = np.array(ids, dtype=np.int32)
        if not is_chat:
            ids_n, counted_n = _ended(ids_n, counted_n, tokenizer.eos_token_id)
        # Nothing predicts the first token.
        counted_n[:1] = False
        sequences.append(TokenSequence(ids_n, counted_n))
    return sequences


def _counted(places_n: np.ndarray, responses: Iterable[Span]) -> np.ndarray:
    """Return which tokens have a character of a response, by the characters (n, 2) that each stands for.

    A token across the start of a response counts: after the prompt alone, the model has to say what is left of it.
    """
    starts_n, ends_n = places_n.T
    counted_n = np.zeros(len(places_n), dtype=bool)
    for start, end in responses:
        # Tokens of blanks may have no characters: they stand where the blanks end.
        counted_n |= (ends_n > start) & ((starts_n < end) | (ends_n <= end))
    return counted_n


def _ended(ids_n: np.ndarray, counted_n: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a sequence that ends with EOS, which counts; some tokenizers, and some texts, have it already."""
    if not ids_n.size or ids_n[-1] != eos:
        ids_n, counted_n = np.append(ids_n, np.int32(eos)), np.append(counted_n, False)
    counted_n[-1] = counted_n.any()
    return ids_n, counted_n


def pack_sequences(sequences: Iterable[TokenSequence], length: int) -> list[TokenSequence]:
    """Return sequences of at most a length, each of which is one or several of the given ones, which fit it.

    Each goes to the first that has room for it.
    """
    packed: list[list[TokenSequence]] = []
    room: list[int] = []
    # The first sequence that may have room for this many tokens. Earlier ones stay too full, since room never grows.
    first = [0] * (length + 1)
    for sequence in sequences:
        size = len(sequence.ids_n)
        while first[size] < len(room) and room[first[size]] < size:
            first[size] += 1
        if first[size] == len(room):
            packed.append([])
            room.append(length)
        packed[first[size]].append(sequence)
        room[first[size]] -= size
    return [TokenSequence(*map(np.concatenate, zip(*parts, strict=True))) for parts in packed]
