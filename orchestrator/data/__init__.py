"""Reads text or token files into token blocks, for calibration and held-out evaluation.

Shapes: B blocks of T tokens. A text is tokenised with the model's own tokenizer and cut into blocks that do
not overlap (``text.py``). Rows with ``input_ids`` are blocks already, which are used unchanged.
"""

from pathlib import Path

from orchestrator.data.blocks import (
    DataError,
    TextOptions,
    TokenBlocks,
    check_length,
    check_vocabulary,
    freeze,
    save_blocks,
)
from orchestrator.data.files import local_file
from orchestrator.data.pinning import pin
from orchestrator.data.text import read_text
from orchestrator.data.token_rows import has_token_rows, read_rows
from orchestrator.secrets import uris_masked
from orchestrator.sources import storage

__all__ = ["DataError", "TextOptions", "TokenBlocks", "freeze", "load_tokens", "save_blocks"]


def load_tokens(spec: str, *, model_dir: Path, vocab_size: int, max_length: int, options: TextOptions) -> TokenBlocks:
    """Load token blocks for a model.

    Args:
        spec: The source: ``builtin:calibration`` or ``builtin:heldout``; a ``.txt`` or ``.md`` file; a ``.jsonl``,
            ``.json``, ``.csv`` or ``.tsv`` file of rows; any of these as ``.gz``, ``.zst``, ``.bz2`` or ``.xz``; a
            ``.parquet`` or ``.arrow`` file, or a folder of ``datasets.save_to_disk``, of rows. Rows of ``input_ids``
            are token blocks, whatever other columns there are. Or the URI
            of such a file in a store (``s3://``, ``gs://``, ``hf://``); or a hub dataset,
            ``name[@revision][:config[:split]]`` (by default the main branch and the train split).
            ``orchestrator/data/rows.py`` says which columns make a row's text.
        model_dir: The directory with the model's tokenizer; unused for token files.
        vocab_size: The model's vocabulary size; token ids must be below it.
        max_length: The longest sequence that the model takes, in tokens (``max_position_embeddings``).
        options: Which blocks are taken.

    Returns:
        The blocks, at least one.

    Raises:
        DataError: The source, the tokenizer or the tokens cannot be used; the message says why in one line.
    """
    pinned = pin(spec)
    path = local_file(pinned or spec)
    with storage.naming_uri(spec, path, DataError):
        if path is not None and has_token_rows(path):
            ids_BT = read_rows(spec, path, vocab_size)
            ids_BT = ids_BT[: options.most_blocks(ids_BT.shape[1])]
            found, source_digest = len(ids_BT), None
        else:
            length = min(options.sequence_length, max_length)
            ids_BT, found, source_digest = read_text(pinned or spec, path, model_dir, length, options)
            check_vocabulary(spec, ids_BT.reshape(-1), vocab_size, lambda position: position // length)
    check_length(spec, ids_BT, max_length)
    # Records name the source; they need no password to do so.
    return freeze(uris_masked(spec), ids_BT, found, source_digest, pinned)
