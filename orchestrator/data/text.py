"""Turns text into token blocks, in bounded memory and time.

Special tokens are the tokenizer's default. They are added to each document, as in the model's training, and once
to a whole ``.txt`` or ``.md``, which is one running text. A chat template puts them into a chat itself. Nothing else is
put between documents.

For calibration, only the first ``blocks.POOL`` blocks per requested block are read, so a source of any size takes the
same time. A uniform random subset of them is kept in the order of the text (a reservoir: memory holds no more). For
evaluation, all blocks are taken, or the first ones.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from orchestrator.data.blocks import DataError, TextOptions, draw
from orchestrator.data.documents import read_documents
from orchestrator.data.files import MOST_EMPTY, naming_file
from orchestrator.data.forms import RUNNING, form_of, open_text
from orchestrator.data.rows import Document
from orchestrator.data.tokenizer import (
    BATCH_CHARACTERS,
    batches,
    load_tokenizer,
    naming_tokenizer_failure,
    render_chat,
)

# Limit on the tokens of a text that is evaluated whole: hours for a small model.
MOST_EVALUATED = 1 << 24
_PIECE_CHARACTERS = 1 << 16  # size of a piece of a .txt; tokenizers process a batch's pieces in parallel


def read_text(
    spec: str, path: Path | None, model_dir: Path, length: int, options: TextOptions
) -> tuple[np.ndarray, int, str]:
    """Return blocks drawn from a text, the number of available blocks, and the digest of the text read."""
    tokenizer = load_tokenizer(spec, model_dir)
    text_hash = hashlib.sha256()
    if path is not None and form_of(path) in RUNNING:
        pieces = _hash_texts(text_pieces(path), text_hash, end=b"")
        tokens: Iterator[np.ndarray] = chain(
            _encode(tokenizer, islice(pieces, 1), add_special_tokens=True),
            _encode(tokenizer, pieces, add_special_tokens=False),
        )
    else:
        documents = _with_text(spec, read_documents(spec, path, partial(render_chat, tokenizer)))
        tokens = _encode_documents(tokenizer, documents, text_hash)
    ids_BT, found = take_blocks(spec, tokens, length, options)
    return ids_BT, found, text_hash.hexdigest()


def _with_text(spec: str, documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents that are not empty; refuse a source that has nothing else for very long."""
    empty = 0
    for document in documents:
        if document.text:
            empty = 0
            yield document
        elif (empty := empty + 1) > MOST_EMPTY:
            raise DataError(f"{spec}: more than {MOST_EMPTY:,} documents without text follow each other: drop them")


def text_pieces(path: Path) -> Iterator[str]:
    """Yield pieces that together are the whole text, blank lines included."""
    rest = ""
    with naming_file(path), open_text(path) as file:
        while read := file.read(_PIECE_CHARACTERS):
            before = len(rest)
            rest += read
            if cut := _last_line_start(rest, before - 1):
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest


def _last_line_start(text: str, first: int) -> int:
    """Return where the last line that starts with a word begins: tokens seldom cross it, but often cross blanks.

    Before `first` there is none.
    """
    first, end = max(first, 0), len(text)
    while (newline := text.rfind("\n", first, end)) >= 0:
        if newline + 1 < len(text) and not text[newline + 1].isspace():
            return newline + 1
        end = newline
    return len(text) if len(text) >= BATCH_CHARACTERS else 0  # an endless line is cut anywhere


def _hash_texts(texts: Iterable[str], text_hash: Any, end: bytes) -> Iterator[str]:
    for text in texts:
        text_hash.update(text.encode() + end)
        yield text


def _encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], text_hash: Any
) -> Iterator[np.ndarray]:
    """Yield the token ids of documents in order; chats have their special tokens already."""
    for is_chat, group in groupby(documents, key=lambda document: document.is_chat):
        texts = _hash_texts((document.text for document in group), text_hash, end=b"\0")
        yield from _encode(tokenizer, texts, add_special_tokens=not is_chat)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, add_special_tokens: bool
) -> Iterator[np.ndarray]:
    """Yield the token ids of the texts in order, one array per batch of texts."""
    failed = f"the tokenizer in {tokenizer.name_or_path} cannot read the text"
    for batch in batches(texts, len):
        with naming_tokenizer_failure(failed, "download its files again"):
            encoded = tokenizer(
                batch,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # otherwise it warns about documents longer than the model's sequences
            )
            ids = np.fromiter(chain.from_iterable(encoded["input_ids"]), dtype=np.int32)
        yield ids


def take_blocks(spec: str, tokens: Iterable[np.ndarray], length: int, options: TextOptions) -> tuple[np.ndarray, int]:
    """Return the blocks that the options ask for, and the number of available blocks."""
    if options.samples is not None:
        return draw_blocks(spec, tokens, length, options.samples, options.seed)
    limit = options.most_blocks(length)
    most = MOST_EVALUATED // length if limit is None else limit
    blocks = list(islice(_cut(spec, tokens, length), most + (limit is None)))
    if len(blocks) > most:
        raise DataError(
            f"{spec}: more than {MOST_EVALUATED:,} tokens to evaluate on, which takes very long: "
            f"say how many to take (--evaluate-tokens), or give a smaller text"
        )
    return np.stack(blocks), len(blocks)


def draw_blocks(
    spec: str, tokens: Iterable[np.ndarray], length: int, samples: int, seed: int
) -> tuple[np.ndarray, int]:
    """Return a random subset of the blocks of a token stream, and the number of available blocks."""
    blocks, found = draw(_cut(spec, tokens, length), samples, seed)
    return np.stack(blocks), found


def _cut(spec: str, tokens: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Yield the blocks of a token stream, which end with its last whole one.

    Raises:
        DataError: It has none.
    """
    rest = np.empty(0, dtype=np.int32)
    found = 0
    for chunk in tokens:
        rest = np.concatenate([rest, chunk])
        whole = len(rest) // length
        for block in rest[: whole * length].reshape(whole, length):
            yield block.copy()  # a view would keep its whole chunk alive
        found += whole
        rest = rest[whole * length :]
    if not found:
        _raise_too_short(spec, len(rest), length)


def _raise_too_short(spec: str, tokens: int, length: int) -> None:
    if not tokens:
        raise DataError(f"{spec}: no text in it, all documents are empty: give a source with text")
    raise DataError(
        f"{spec}: {tokens} tokens found, and one block needs {length}: "
        f"give more text, or a sequence length of at most {tokens}"
    )
