"""Reads one value of a setting as Python users pass it: a path for text, a number of NumPy, any list for a tuple."""

import operator
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Real
from typing import Any

# What pathlib makes of a URI: it merges slashes.
_MERGED_URI = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]", re.IGNORECASE)


def items_of(value: Any) -> Iterable[Any]:
    """Return the values of a repeated setting; one value, the usual case, may be given without a list.

    Raises:
        TypeError: It has no order.
    """
    if isinstance(value, str | os.PathLike) or getattr(value, "ndim", None) == 0 or not isinstance(value, Iterable):
        return (value,)
    if isinstance(value, bytes | bytearray | Mapping | Set):
        raise TypeError("no list")
    return value


def read_value(kind: type, value: Any) -> Any:
    """Return one value as a str, a bool, an int or a float.

    Raises:
        TypeError: It has another type.
        ValueError: It has the type, and cannot be used; the message says why, and follows "NAME is".
    """
    # Scalars of NumPy, and arrays and tensors without axes, know Python's value.
    scalar = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    return _READ[kind](scalar)


def shown_briefly(value: Any) -> str:
    """Return a value of any type for a message, on one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    # Python prints no integer of more than 4300 digits.
    except ValueError:
        return f"a huge {type(value).__name__}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        # The text itself: `str` of an enum's member is the member's name.
        text = str.__str__(value)
    elif isinstance(value, os.PathLike):
        text = os.fsdecode(value)
        if _MERGED_URI.match(text):
            raise ValueError(f"{value!r}, and a path merges the slashes of a URI: pass the URI as text")
    else:
        raise TypeError("no text")
    if "\0" in text:
        raise ValueError(f"{text!r}: leave out the null character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r}, which is no UTF-8: rename it, or link to it by another name") from None
    return text


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError("no truth value")


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("no number")
    number = operator.index(value)
    if number.bit_length() > 63:
        raise ValueError("too large: it must be less than 2^63")
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError("no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("too large for a number with a fraction") from None


_READ: Mapping[type, Callable[[Any], Any]] = {str: _text, bool: _truth, int: _whole, float: _number}
