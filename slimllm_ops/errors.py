"""Errors that a user can act on: each says what was asked, what was found and what to do, in one line.

They are plain exceptions with one string, so they pickle and cross a cluster unchanged.
"""


def shown(text: str, most: int = 60) -> str:
    """Return the beginning of a text from a file, safe to print in a message: one line without control characters."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."


class InputError(ValueError):
    """The user's request cannot be carried out; the message says what to change."""


class CheckpointError(InputError):
    """A model directory is missing, incomplete, broken, or of an unsupported kind."""


class UnsolvableError(InputError):
    """These weights and data have no solution, so trying again would fail the same way."""


class NonFiniteError(UnsolvableError):
    """Weights or activations hold NaN or infinity; the message names the layer."""


class MiscountError(RuntimeError):
    """Moments do not cover the tokens that they should: some were lost or counted twice."""


class ReadBackError(RuntimeError):
    """A written checkpoint does not compute what the run computed, because of a bug or a broken disk."""


class SolveError(UnsolvableError):
    """A system of equations has no trustworthy solution; the message names it and its condition."""
