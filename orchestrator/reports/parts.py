"""Defines the parts that a page is made of, and how values are written in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# What stands for a value that is not known.
UNKNOWN = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of each row is its heading, and the other cells are numbers unless they are words."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure as an `<svg>` element, with its title, and its values as a table."""

    title: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Continuation:
    """A text and what the models make of it; each is a name and the text that it adds."""

    prompt: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a page.

    Attributes:
        name: Its id.
        title: Its heading.
        notes: Sentences below the heading.
        drawings: Its figures.
        tables: Its tables.
        folded: Tables that a reader opens.
        programs: Code, each with what it does.
        continuations: Texts that models continued.
    """

    name: str
    title: str
    notes: tuple[str, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    programs: tuple[tuple[str, str], ...] = ()
    continuations: tuple[Continuation, ...] = ()

    @property
    def is_narrow(self) -> bool:
        """Whether it has one figure and nothing else, so that another can stand beside it."""
        return len(self.drawings) == 1 and not (self.tables or self.folded or self.programs or self.continuations)


def is_finite(value: object) -> bool:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown_number(value: object, form: str = "{:,.3f}") -> str:
    """Return a number in a form; what is no number as its text, and nothing as `UNKNOWN`."""
    if value is None or value == "":
        return UNKNOWN
    return form.format(value) if is_finite(value) else str(value)


def shown_setting(value: object) -> str:
    """Return a setting's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or UNKNOWN
    return UNKNOWN if value is None else str(value)


def listed(words: Sequence[str]) -> str:
    """Return words with commas between them, and "and" before the last."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
