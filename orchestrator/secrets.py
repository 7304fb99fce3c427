"""Masks the secrets in text before it is printed, written to a file or sent to a server.

Three things are secret: the part of an address before the @, the values of an address's query, and the values of
environment variables with names like HF_TOKEN, AWS_SECRET_ACCESS_KEY or MLFLOW_TRACKING_PASSWORD.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

MASK = "***"
# A password may itself hold "@", "/" or ":". A port is not a password: nothing in http://host:5000/a@b is masked.
_CREDENTIALS = re.compile(r"://(?:[^\s'\"<>/?#@:]*:(?!\d+(?:[/?#\s'\"]|$))[^\s'\"<>]*|[^\s'\"<>/?#]*)@")
# Errors also show a query without its address: "Max retries exceeded with url: /?token=...".
_QUERY = re.compile(r"\?[^\s'\"<>#]*")
_QUERY_VALUE = re.compile(r"=[^&;]*")
# How the names of secret variables end, in capitals.
_SECRET_ENDINGS = ("TOKEN", "PASSWORD", "PASSWD", "SECRET", "API_KEY", "ACCESS_KEY", "STORAGE_KEY", "CONNECTION_STRING")
# Shorter values would also match parts of unrelated words.
_SHORTEST = 4


def masked(text: str) -> str:
    """Return a text with every secret replaced by ***."""
    for value in _secret_values():
        text = text.replace(value, MASK)
    text = _CREDENTIALS.sub(f"://{MASK}@", text)
    return _QUERY.sub(lambda found: _QUERY_VALUE.sub(f"={MASK}", found[0]), text)


def masked_all(value: Any) -> Any:
    """Return a value with all text masked, also in nested lists and mappings; other values are unchanged."""
    match value:
        case str():
            return masked(value)
        case Mapping():
            return {masked_all(key): masked_all(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(masked_all(item) for item in value)
        case _:
            return value


def _secret_values() -> list[str]:
    """Return the values to mask, the longest first, because one may be the beginning of another."""
    values = {value for name, value in os.environ.items() if _is_secret(name) and len(value) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)


@cache
def _is_secret(name: str) -> bool:
    """Return whether the variables of this name are secret; every line that is printed asks this for every variable."""
    return name.upper().endswith(_SECRET_ENDINGS)
