"""Reads the objects of a JSON file one after the other, whether they stand in a list or alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from orchestrator.data.blocks import DataError
from orchestrator.data.files import LONGEST_DOCUMENT
from orchestrator.data.rows import too_long

_PIECE_CHARACTERS = 1 << 16
_BLANKS = re.compile(r"[ \t\r\n]*")


def read_objects(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list, or objects that follow each other; hold no more than one of them.

    Raises:
        DataError: The file holds something else, or ends too early.
    """
    text = _Text(file, path)
    in_list = text.next() == "["
    if in_list:
        text.skip()
        if text.next() == "]":
            return
    while in_list or text.next():
        yield text.read_object()
        if not in_list:
            continue
        if (found := text.next()) not in (",", "]"):
            raise text.broken("expected a comma or the end of the list" if found else "the list does not end")
        text.skip()
        if found == "]":
            break
    if text.next():
        raise text.broken("there is something after the list")


class _Text:
    """The part of a file that is being read, and the number of objects before it."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._number = 0

    def next(self) -> str:
        """Return the next character that is not blank, and stay there; nothing at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            assert blanks is not None, "the pattern matches nothing too"
            self._at = blanks.end()
            if self._at < len(self._text) or not self._read_more(_PIECE_CHARACTERS):
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Go on by a character."""
        self._at += 1

    def read_object(self) -> dict[str, Any]:
        """Return the object that begins here, and go on to its end."""
        if self.next() != "{":
            raise self.broken("expected an object")
        while True:
            try:
                found, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # What was read may end within the object. Each time twice as much is read, so the work stays linear.
                length = len(self._text) - self._at
                if length > LONGEST_DOCUMENT:
                    raise too_long(self._where()) from error
                if not self._read_more(max(length, _PIECE_CHARACTERS)):
                    raise self.broken(error.msg) from error
            except RecursionError as error:
                raise DataError(f"{self._where()} is nested too deeply: drop it") from error
            # More than JSON's own errors: Python refuses numbers with very many digits.
            except ValueError as error:
                raise self.broken(str(error)) from error
            else:
                self._number += 1
                assert isinstance(found, dict), "what begins with a brace is an object"
                return found

    def broken(self, reason: str) -> DataError:
        """Return the error for a file that holds no objects here."""
        return DataError(
            f"{self._where()} is not a JSON object ({reason}): "
            f'give a list of objects, as in [{{"text": ...}}], or an object on each line'
        )

    def _where(self) -> str:
        return f"{self._path}: row {self._number}"

    def _read_more(self, characters: int) -> bool:
        read = self._file.read(characters)
        self._text = self._text[self._at :] + read
        self._at = 0
        return bool(read)
