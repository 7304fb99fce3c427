"""Reads the documents of any source, one after the other."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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
from orchestrator.data.text_rows import Places, read_text_rows
from orchestrator.sources import hub


def read_documents(spec: str, path: Path | None, render: Render) -> Iterator[Document]:
    """Return an iterator over the documents that the spec names, in order; it reads them lazily.

    Args:
        spec: The source.
        path: Its file or folder; None for a built-in text or a dataset of the hub.
        render: Applies the tokenizer's chat template.
    """
    if spec.startswith("builtin:"):
        return _builtin_documents(spec)
    return (document_of(row, where, render) for where, row in read_places(spec, path, columns_to_read))


def read_places(spec: str, path: Path | None, choose: Callable[[Iterable[str]], list[str]]) -> Places:
    """Return an iterator over the place and the values of each row that the spec names, in order; it reads them lazily.

    Args:
        spec: The source.
        path: Its file or folder; None for a dataset of the hub.
        choose: Returns which of a table's columns to read; none if the table has no rows of the kind that is wanted.
    """
    if path is None:
        return _hub_rows(spec, choose)
    return read_text_rows(path) if form_of(path) in ROWS else _table_rows(path, choose)


def _builtin_documents(spec: str) -> Iterator[Document]:
    # Imported here, so that the code that makes the built-in model can import this package.
    from orchestrator.builtin import calibration_text, heldout_text

    texts = {"builtin:calibration": calibration_text, "builtin:heldout": heldout_text}
    if spec not in texts:
        raise DataError(f"{spec}: no such built-in text: use {' or '.join(texts)}")
    return map(Document, texts[spec]())


def _table_rows(path: Path, choose: Callable[[Iterable[str]], list[str]]) -> Places:
    names = table_columns(path)
    read = choose(names)
    if not read:
        raise DataError(f"{path}: neither 'text' nor 'input_ids' among the columns ({list_names(names)}): {REMEDY}")
    number = 0
    for arrays in read_columns(path, read):
        columns = [python_values(path, name, array, number) for name, array in zip(read, arrays, strict=True)]
        for values in zip(*columns, strict=True):
            yield f"{path}: row {number}", without_nulls(dict(zip(read, values, strict=True)))
            number += 1


def _hub_rows(spec: str, choose: Callable[[Iterable[str]], list[str]]) -> Places:
    match = HUB_NAME.fullmatch(spec)
    assert match is not None  # local_file refuses other names
    rows = hub.dataset_rows(match["name"], match["revision"], match["config"], match["split"] or "train", COLUMNS)
    try:
        for number, row in enumerate(rows):
            # As a table's rows are read: only the columns that make its document, if there are any.
            yield f"{spec}: row {number}", without_nulls({name: row[name] for name in choose(row) or row})
    except hub.HubError as error:
        raise hub_error(spec, error) from error
