"""Makes JSON of any value, for the journal and for `--json`. It imports little, so that short commands stay short."""

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.secrets import uris_masked


def json_value(value: object) -> Any:
    """Return a value as JSON can hold it: NaN as null, infinity as "inf" or "-inf", unknown types as their text.

    The credentials of addresses are masked. What else is secret stays: a value of the environment may be any word, also
    the name of an event or of a method. Who writes a text for people masks it first.
    """
    match value:
        case None | bool() | int():
            return value
        case str():
            return uris_masked(value)
        case float():
            return value if math.isfinite(value) else None if math.isnan(value) else str(float(value))
        case Mapping():
            return {uris_masked(str(key)): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
        case _ if hasattr(value, "tolist"):
            return json_value(value.tolist())
        case _:
            return uris_masked(str(value))
