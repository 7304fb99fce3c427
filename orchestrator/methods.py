"""Lists the names of methods, for `--help` and for checks that should not wait for torch.

`slimllm` works layer by layer. All others are rows of slimllm_ops/methods.py and need one pass; a test compares them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Methods:
    """A group of methods that take a setting.

    Attributes:
        label: The group's name in help texts.
        names: The methods' names.
        but: The one method that does not take the setting; if given, user-defined methods take it too.
    """

    label: str
    names: tuple[str, ...]
    but: str | None = None

    def __contains__(self, method: str) -> bool:
        """Return whether a method belongs to the group."""
        return method != self.but if self.but else method in self.names

    def __str__(self) -> str:
        """List the names: "gram, flap or fasp"."""
        *first, last = self.names
        return f"{', '.join(first)} or {last}" if first else last


PAPER = Methods("slimllm", ("slimllm",))
ONE_PASS = Methods(
    "one-pass methods",
    ("gram", "flap", "fasp", "ziplm", "modegpt", "slimgpt", "wanda-sp", "magnitude", "random"),
    "slimllm",
)
GRAM = Methods("gram", ("gram",))


def known_methods(asked: str) -> tuple[str, ...]:
    """Return the names of all methods; include user-defined ones only if `asked` is not a known name."""
    if asked in (known := PAPER.names + ONE_PASS.names):
        return known
    # The registry takes seconds to import, so import it only here.
    from slimllm_ops.methods import METHODS

    return PAPER.names + tuple(METHODS)
