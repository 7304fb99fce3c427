"""Prints to terminals and files that cannot hold every character."""

import io
import sys
from typing import TextIO


def escape_what_cannot_be_shown() -> None:
    """Let stdout and stderr print a backslash escape for a character that they cannot encode, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        # A program that has replaced a stream, or closed it, decides itself.
        if isinstance(stream, io.TextIOWrapper) and not _keeps_bytes(stream):
            stream.reconfigure(errors="backslashreplace")


def _keeps_bytes(stream: TextIO) -> bool:
    """Return whether a stream writes a file name of any bytes as it is."""
    return stream.errors == "surrogateescape" and stream.encoding.lower().replace("-", "") == "utf8"
