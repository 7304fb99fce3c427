"""Reads the documents of any source, one after the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from orchestrator.data.blocks import DataError
from orchestrator.data.files import HUB_NAME, LONGEST_DOCUMENT, list_names, naming_file, read_columns, table_columns
from orchestrator.data.forms import LINES, OBJECTS, SUFFIXES, form_of, open_text
from orchestrator.data.json_objects import read_objects
from orchestrator.data.rows import (
    COLUMNS,
    REMEDY,
    Document,
    Render,
    columns_to_read,
    document_of,
    too_long,
    without_nulls,
)
from orchestrator.sources import hub


def read_documents(spec: str, path: Path | None, render: Render) -> Iterator[Document]:
    """Return an iterator over the documents that the spec names, in order; it reads them lazily.

    Args:
        spec: The source.
        path: Its file or folder; None for a built-in text or a dataset of the hub.
        render: Applies the tokenizer's chat template.
    """
    if path is None:
        return _builtin_documents(spec) if spec.startswith("builtin:") else _hub_documents(spec, render)
    readers = {LINES: _jsonl_documents, OBJECTS: _json_documents}
    return readers.get(form_of(path), _table_documents)(path, render)


def _builtin_documents(spec: str) -> Iterator[Document]:
    # Imported here, so that the code that makes the built-in model can import this package.
    from orchestrator.builtin import calibration_text, heldout_text

    texts = {"builtin:calibration": calibration_text, "builtin:heldout": heldout_text}
    if spec not in texts:
        raise DataError(f"{spec}: no such built-in text: use {' or '.join(texts)}")
    return map(Document, texts[spec]())


def _jsonl_documents(path: Path, render: Render) -> Iterator[Document]:
    with naming_file(path), open_text(path) as file:
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
            yield document_of(row, f"{path}: line {number}", render)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file; refuse a line that is longer than a document may be."""
    number = 0
    while line := file.readline(LONGEST_DOCUMENT + 1):
        number += 1
        if len(line) > LONGEST_DOCUMENT:
            raise too_long(f"{path}: line {number}")
        yield line


def _json_documents(path: Path, render: Render) -> Iterator[Document]:
    with naming_file(path), open_text(path) as file:
        for number, row in enumerate(read_objects(file, path)):
            yield document_of(row, f"{path}: row {number}", render)


def _table_documents(path: Path, render: Render) -> Iterator[Document]:
    names = table_columns(path)
    read = columns_to_read(names)
    if not read:
        raise DataError(f"{path}: neither 'text' nor 'input_ids' among the columns ({list_names(names)}): {REMEDY}")
    number = 0
    for arrays in read_columns(path, read):
        for values in zip(*arrays, strict=True):
            row = {name: value.as_py() for name, value in zip(read, values, strict=True)}
            yield document_of(without_nulls(row), f"{path}: row {number}", render)
            number += 1


def _hub_documents(spec: str, render: Render) -> Iterator[Document]:
    match = HUB_NAME.fullmatch(spec)
    assert match is not None  # local_file refuses other names
    rows = hub.dataset_rows(match["name"], match["config"], match["split"] or "train", COLUMNS)
    try:
        for number, row in enumerate(rows):
            yield document_of(_known(row), f"{spec}: row {number}", render)
    except hub.HubError as error:
        raise DataError(
            f"{spec}: no such file, and the Hugging Face hub did not provide such a dataset "
            f"({error}): give a local file ({', '.join(SUFFIXES)}), or use builtin:calibration"
        ) from error


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the hub as a table's rows are read: only the columns that make its document, if there are any."""
    return without_nulls({name: row[name] for name in columns_to_read(row) or row})
