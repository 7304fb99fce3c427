"""Reads the rows of a file of text, one after the other: lines or a list of JSON objects, or separated values.

A row is an object by the names of its columns, and has a place, which begins every error about it.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from orchestrator.data.blocks import DataError
from orchestrator.data.files import LONGEST_DOCUMENT, MOST_EMPTY, naming_file
from orchestrator.data.forms import LINES, SEPARATORS, form_of, open_text
from orchestrator.data.json_objects import read_objects
from orchestrator.data.rows import too_long

Places = Iterator[tuple[str, dict[str, Any]]]


def read_text_rows(path: Path) -> Places:
    """Yield the place and the values of each row.

    Raises:
        DataError: A row cannot be read.
    """
    form = form_of(path)
    with naming_file(path), open_text(path) as file:
        if form in SEPARATORS:
            yield from _separated(file, path, SEPARATORS[form])
        elif form == LINES:
            yield from _objects_on_lines(file, path)
        else:
            for number, row in enumerate(read_objects(file, path)):
                yield f"{path}: row {number}", row


def _objects_on_lines(file: TextIO, path: Path) -> Places:
    for number, line in enumerate(_lines(file, path), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise DataError(f"{where} is nested too deeply: drop it") from error
        # More than JSON's own errors: Python refuses numbers with very many digits.
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({getattr(error, 'msg', error)}): fix or drop it") from error
        if not isinstance(row, dict):
            raise DataError(f'{where} is not an object: write {{"text": ...}} on each line')
        yield where, row


def _separated(file: TextIO, path: Path, separator: str) -> Places:
    """Yield the rows below the header; lines without anything are none."""
    reader = csv.reader(_lines(file, path), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        # A row begins after the line that the last one ended on.
        where = f"{path}: line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{where} does not hold separated values ({error}): fix its quotes, or write .jsonl"
            ) from error
        if row is None:
            return
        if header is None and row:
            header = row
            if len(set(header)) < len(header):
                raise DataError(f"{where} names a column twice: give each column a name of its own")
        elif header is not None and row:
            if len(row) != len(header):
                raise DataError(
                    f"{where} has {len(row)} values, and the first line names {len(header)} columns: fix or drop it"
                )
            yield where, dict(zip(header, row, strict=True))


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file; refuse one that is longer than a document may be, and empty ones without end."""
    number, empty = 0, 0
    while line := file.readline(LONGEST_DOCUMENT + 1):
        number += 1
        empty = empty + 1 if line.isspace() else 0
        if empty > MOST_EMPTY:
            raise DataError(f"{path}: line {number} follows {MOST_EMPTY:,} empty ones: drop them")
        if len(line) > LONGEST_DOCUMENT:
            raise too_long(f"{path}: line {number}")
        yield line
