"""Reads the documents of any source, one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.data.blocks import DataError
from orchestrator.data.files import HUB_NAME, list_names
from orchestrator.data.forms import ROWS, form_of
from orchestrator.data.pinning import hub_error
from orchestrator.data.rows import (
    COLUMNS,
    REMEDY,
    Document,
    Render,
    columns_to_read,
    document_of,
    without_nulls,
)
from orchestrator.data.tables import python_values, read_columns, table_columns
from orchestrator.data.text_rows import read_text_rows
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
    return (_row_documents if form_of(path) in ROWS else _table_documents)(path, render)


def _builtin_documents(spec: str) -> Iterator[Document]:
    # Imported here, so that the code that makes the built-in model can import this package.
    from orchestrator.builtin import calibration_text, heldout_text

    texts = {"builtin:calibration": calibration_text, "builtin:heldout": heldout_text}
    if spec not in texts:
        raise DataError(f"{spec}: no such built-in text: use {' or '.join(texts)}")
    return map(Document, texts[spec]())


def _row_documents(path: Path, render: Render) -> Iterator[Document]:
    for where, row in read_text_rows(path):
        yield document_of(row, where, render)


def _table_documents(path: Path, render: Render) -> Iterator[Document]:
    names = table_columns(path)
    read = columns_to_read(names)
    if not read:
        raise DataError(f"{path}: neither 'text' nor 'input_ids' among the columns ({list_names(names)}): {REMEDY}")
    number = 0
    for arrays in read_columns(path, read):
        columns = [python_values(path, name, array, number) for name, array in zip(read, arrays, strict=True)]
        for values in zip(*columns, strict=True):
            row = dict(zip(read, values, strict=True))
            yield document_of(without_nulls(row), f"{path}: row {number}", render)
            number += 1


def _hub_documents(spec: str, render: Render) -> Iterator[Document]:
    match = HUB_NAME.fullmatch(spec)
    assert match is not None  # local_file refuses other names
    rows = hub.dataset_rows(match["name"], match["revision"], match["config"], match["split"] or "train", COLUMNS)
    try:
        for number, row in enumerate(rows):
            yield document_of(_known(row), f"{spec}: row {number}", render)
    except hub.HubError as error:
        raise hub_error(spec, error) from error


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the hub as a table's rows are read: only the columns that make its document, if there are any."""
    return without_nulls({name: row[name] for name in columns_to_read(row) or row})
