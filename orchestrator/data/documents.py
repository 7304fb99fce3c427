"""The documents of a source, one after the other, whatever the source."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.data.blocks import DataError
from orchestrator.data.files import HUB_NAME, SUFFIXES, explained, one_line, read_column, table_columns

_HUB_TIMEOUT_S = 10.0


def read_documents(spec: str, path: Path | None) -> Iterator[str]:
    """The documents that the spec names, in their order; they are read as they are taken."""
    if path is None:
        return _builtin_documents(spec) if spec.startswith("builtin:") else _hub_documents(spec)
    return _jsonl_documents(path) if path.suffix == ".jsonl" else _table_documents(path)


def _builtin_documents(spec: str) -> Iterator[str]:
    # Imported here, so that what makes the built-in model may import this package.
    from orchestrator.builtin import calibration_text, heldout_text

    texts = {"builtin:calibration": calibration_text, "builtin:heldout": heldout_text}
    if spec not in texts:
        raise DataError(f"{spec}: no such built-in text: use {' or '.join(texts)}")
    return iter(texts[spec]())


def _jsonl_documents(path: Path) -> Iterator[str]:
    with explained(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not JSON ({error.msg}): mend or drop it") from error
            if not isinstance(row, dict):
                raise DataError(f'{path}: line {number} is not an object: write {{"text": ...}} on each line')
            yield _text_of(row, f"{path}: line {number}")


def _table_documents(path: Path) -> Iterator[str]:
    names = table_columns(path)
    if "text" not in names:
        found = ", ".join(names)
        raise DataError(f"{path}: neither 'text' nor 'input_ids' among the columns ({found}): rename one")
    first = 0
    for array in read_column(path, "text"):
        for number, text in enumerate(array.to_pylist(), start=first):
            yield _text_of({"text": text}, f"{path}: row {number}")
        first += len(array)


def _hub_documents(spec: str) -> Iterator[str]:
    import datasets
    from huggingface_hub import HfApi

    match = HUB_NAME.fullmatch(spec)
    assert match is not None  # local_file refuses other names
    name, config, split = match["name"], match["config"], match["split"] or "train"
    try:
        # With no network load_dataset retries for 23 s; this fails at once. Offline mode needs only a cache.
        if not datasets.config.HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield _text_of(row, f"{spec}: row {number}")
    except DataError:
        raise
    # Any: huggingface_hub has changed its HTTP library, and with it the exceptions that reach its callers.
    except Exception as error:
        raise DataError(
            f"{spec}: no file of this name, and no dataset that the Hugging Face hub gives "
            f"({one_line(error)}): give a local file ({', '.join(SUFFIXES)}), or use builtin:calibration"
        ) from error


def _text_of(row: dict[str, Any], where: str) -> str:
    if "text" not in row:
        raise DataError(f"{where}: no 'text' among the columns ({', '.join(row)}): rename the one that has it")
    text = row["text"]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise DataError(f"{where}: 'text' is {kind}: give a string, or drop the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: 'text' has a lone surrogate, which is no character: drop it") from error
    return text
