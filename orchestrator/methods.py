"""The names of methods, for `--help` and checks that do not wait for torch.

`slimllm` goes layer by layer. All others are rows of slimllm_ops/methods.py and need one pass; a test compares them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Methods:
    """Methods that take a setting.

    Attributes:
        label: What help texts call them.
        names: Their names.
        but: The one method that does not take it; then methods of a user's own take it too.
    """

    label: str
    names: tuple[str, ...]
    but: str | None = None

    def __contains__(self, method: str) -> bool:
        """Return whether a method is one of them."""
        return method != self.but if self.but else method in self.names

    def __str__(self) -> str:
        """List the names: "gram, flap or fasp"."""
        *first, last = self.names
        return f"{', '.join(first)} or {last}" if first else last


PAPER = Methods("slimllm", ("slimllm",))
ONE_PASS = Methods(
    "one-pass methods", ("gram", "flap", "fasp", "slimgpt", "wanda-sp", "magnitude", "random"), "slimllm"
)
GRAM = Methods("gram", ("gram",))


def known_methods(asked: str) -> tuple[str, ...]:
    """Return the names of all methods: with those of a user's own if the one that is asked for may be such."""
    if asked in (known := PAPER.names + ONE_PASS.names):
        return known
    # Only here is the registry worth the seconds of its import.
    from slimllm_ops.methods import METHODS

    return PAPER.names + tuple(METHODS)
