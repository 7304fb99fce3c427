"""Reads the documents of any source, one after the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from orchestrator.data.blocks import DataError
from orchestrator.data.files import (
    HUB_NAME,
    LONGEST_DOCUMENT,
    SUFFIXES,
    list_names,
    naming_file,
    read_column,
    table_columns,
)
from orchestrator.sources import hub


def read_documents(spec: str, path: Path | None) -> Iterator[str]:
    """Return an iterator over the documents that the spec names, in order; it reads them lazily."""
    if path is None:
        return _builtin_documents(spec) if spec.startswith("builtin:") else _hub_documents(spec)
    return _jsonl_documents(path) if path.suffix == ".jsonl" else _table_documents(path)


def _builtin_documents(spec: str) -> Iterator[str]:
    # Imported here, so that the code that makes the built-in model can import this package.
    from orchestrator.builtin import calibration_text, heldout_text

    texts = {"builtin:calibration": calibration_text, "builtin:heldout": heldout_text}
    if spec not in texts:
        raise DataError(f"{spec}: no such built-in text: use {' or '.join(texts)}")
    return iter(texts[spec]())


def _jsonl_documents(path: Path) -> Iterator[str]:
    with naming_file(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError as error:
                raise DataError(f"{path}: line {number} is nested too deeply: drop it") from error
            # More than JSON's own errors: Python refuses numbers with very many digits.
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise DataError(f"{path}: line {number} is not JSON ({reason}): fix or drop it") from error
            if not isinstance(row, dict):
                raise DataError(f'{path}: line {number} is not an object: write {{"text": ...}} on each line')
            yield _text_of(row, f"{path}: line {number}")


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file; refuse a line that is longer than a document may be."""
    number = 0
    while line := file.readline(LONGEST_DOCUMENT + 1):
        number += 1
        if len(line) > LONGEST_DOCUMENT:
            raise _too_long(f"{path}: line {number}")
        yield line


def _table_documents(path: Path) -> Iterator[str]:
    names = table_columns(path)
    if "text" not in names:
        raise DataError(f"{path}: neither 'text' nor 'input_ids' among the columns ({list_names(names)}): rename one")
    number = 0
    for array in read_column(path, "text"):
        for value in array:
            yield _text_of({"text": value.as_py()}, f"{path}: row {number}")
            number += 1


def _hub_documents(spec: str) -> Iterator[str]:
    match = HUB_NAME.fullmatch(spec)
    assert match is not None  # local_file refuses other names
    try:
        for number, row in enumerate(hub.dataset_rows(match["name"], match["config"], match["split"] or "train")):
            yield _text_of(row, f"{spec}: row {number}")
    except hub.HubError as error:
        raise DataError(
            f"{spec}: no such file, and the Hugging Face hub did not provide such a dataset "
            f"({error}): give a local file ({', '.join(SUFFIXES)}), or use builtin:calibration"
        ) from error


def _text_of(row: dict[str, Any], where: str) -> str:
    if "text" not in row:
        raise DataError(f"{where}: no 'text' among the columns ({list_names(row)}): rename the one that has it")
    text = row["text"]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise DataError(f"{where}: 'text' is {kind}: give a string, or drop the row")
    if len(text) > LONGEST_DOCUMENT:
        raise _too_long(where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: 'text' has a lone surrogate, which is not a character: drop it") from error
    return text


def _too_long(where: str) -> DataError:
    return DataError(f"{where} is longer than {LONGEST_DOCUMENT:,} characters: split it into several documents")
