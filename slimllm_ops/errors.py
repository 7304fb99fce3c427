"""Errors that a user can act on: each says what was asked, what was found and what to do, in one line.

They are plain exceptions of one string, so they pickle and cross a cluster as they are.
"""


def shown(text: str, most: int = 60) -> str:
    """Return what a message shows of a text of a file: its beginning, in one line that steers no terminal."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."


class InputError(ValueError):
    """What the user asked for cannot be done as asked; the message says what to change."""


class CheckpointError(InputError):
    """A model directory is missing, incomplete, broken, or of a kind that cannot be read."""


class UnsolvableError(InputError):
    """These weights and these data have no answer: to try again would end the same way."""


class NonFiniteError(UnsolvableError):
    """Weights or activations hold NaN or infinity; the message names the layer."""


class MiscountError(RuntimeError):
    """Moments are not of the tokens that they should be of: some were lost or counted twice."""


class ReadBackError(RuntimeError):
    """A checkpoint that was written does not compute what the run computed: a bug or a broken disk."""


class SolveError(UnsolvableError):
    """A system of equations has no solution that can be trusted; the message names it and its condition."""
