"""Masks the secrets in text, and the credentials of the addresses in data.

`masked` is for what people and logs read: the terminal, errors, tracebacks, and in MLflow the tags and the names of
places. It hides what is secret by its form, and the values of environment variables with names like HF_TOKEN,
OPENAI_KEY or MYSQL_PWD, also where they are quoted, percent-encoded or in base64.

`uris_masked` is for what a run computes and records: it hides the credentials and the queries of addresses, and looks
at nothing but the text. So the environment never changes a byte of an output.
"""

import base64
import binascii
import html
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

MASK = "***"
# Shorter values would also match parts of unrelated words.
_SHORTEST = 4
# A line of a key that has several, such as a private key's.
_LINE = 16
_HARMLESS_VALUES = {"true", "false", "none", "null", "auto", "default", "token", "enabled", "disabled"}

# How names of secrets end, also within a word: PGPASSWORD.
_ENDINGS = (
    *("TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "CREDENTIAL", "CREDENTIALS", "SIGNATURE"),
    *("APIKEY", "AUTHORIZATION", "CONNECTIONSTRING"),
)
# Words that make a name secret as its last one, after another: MYSQL_PWD, but not PWD, which is a folder.
_LAST_WORDS = {"KEY", "PWD", "PASS", "PW", "PAT", "AUTH", "DSN", "COOKIE", "BEARER"}
# Words that make a name secret wherever they stand, unless it ends with a word that tells of something else.
_WORDS = {"TOKEN", "PASSWORD", "PASSWD", "SECRET", "SIG", "JWT"}
_OF_SOMETHING_ELSE = {
    *(
        "ID",
        "NAME",
        "PATH",
        "FILE",
        "DIR",
        "FOLDER",
        "MODE",
        "TYPE",
        "URL",
        "URI",
        "HOST",
        "PORT",
        "VERSION",
        "PROVIDER",
    ),
    *("LENGTH", "LIMIT", "COUNT", "SIZE", "SECONDS", "TTL", "EXPIRY", "PARALLELISM"),
}
# Tokens of a text, not of a person.
_SPECIAL_TOKEN = re.compile(r"(?:pad|eos|bos|unk|sep|cls|mask|special|added|image|stop)_?tokens?", re.IGNORECASE)
_PARTS_OF_A_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

# A password may itself hold "@", "/", ":" or quotes. A port is not a password: nothing in http://host:5000/a@b is
# masked. JSON may escape slashes.
_CREDENTIALS = re.compile(
    r"(:\\?/\\?/)(?:[^\s'\"<>/?#@:]*:(?!\d+(?:[/?#\s'\"]|$))\S*|[^\s'\"<>/?#]*)@",
)
# The same, percent-encoded as part of another address, once or more often.
_ENCODED_CREDENTIALS = re.compile(
    r"(%(?:25)*3A(?:%(?:25)*2F){2})"
    r"(?:(?:(?!%(?:25)*(?:2F|3F|23|40|3A))[^\s'\"<>&])*%(?:25)*3A(?!\d+(?:%(?:25)*(?:2F|3F|23)|[\s'\"&]|$))[^\s'\"<>&]*"
    r"|(?:(?!%(?:25)*(?:2F|3F|23))[^\s'\"<>&])*)(%(?:25)*40)",
    re.IGNORECASE,
)
# An address that was cut: "http://user:passw...".
_CUT_CREDENTIALS = re.compile(r"(:\\?/\\?/)[^\s'\"<>/?#@:]*:(?!\d+(?:[/?#\s'\"]|$))[^\s@]*(?=\.\.\.|…)")
_URI = re.compile(r"[a-z][a-z0-9+.-]*:\\?/\\?/[^\s'\"<>]+", re.IGNORECASE)
_ENCODED_URI = re.compile(r"[a-z][a-z0-9+.-]*%(?:25)*3A(?:%(?:25)*2F){2}[^\s'\"<>&]+", re.IGNORECASE)
# Errors also show a query without its address: "Max retries exceeded with url: /?token=...".
_QUERY = re.compile(r"\?[^\s'\"<>#]*")
_QUERY_VALUE = re.compile(r"=[^&;]*")
_ENCODED_QUERY = re.compile(r"%(?:25)*3F[^\s'\"<>#&]*", re.IGNORECASE)
_ENCODED_VALUE = re.compile(r"(%(?:25)*3D)(?:(?!%(?:25)*26).)*", re.IGNORECASE)
_ENCODED_NAMED = re.compile(r"([\w.-]+)(%(?:25)*3D)((?:(?!%(?:25)*26)[^\s'\"<>&;])+)", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"([A-Za-z][\w.-]*)(=)(?:(\\?[\"'])(?:(?!\3).)+\3?|(?:(?![\"'][,)\]}])[^\s&;])*[^\s&;\"')\]},.])", re.DOTALL
)
_IN_MAPPING = re.compile(
    r"(?P<quote>\\?[\"'])([\w.-]+)((?P=quote)\s*:\s*b?(?P=quote))((?:(?!(?P=quote)).)+)(?=(?P=quote))", re.DOTALL
)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-[\w-]*(?:key|token|secret)|api-key|(?:set-)?cookie)(\s*:\s*)"
    r"((?:Bearer|Basic|Digest|Negotiate|Token)\s+)?[^\s\"',;]+(?:;\s*[^\s\"',;]+)*",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"\b(Bearer)(\s+|%20|\+)(?!tokens?\b|auth|scheme|realm|\*\*\*)([A-Za-z0-9._~+/=%-]*[A-Za-z0-9_~+/=-])",
    re.IGNORECASE,
)
_BASIC = re.compile(r"\b(Basic)(\s+|%20|\+)([A-Za-z0-9+/_-]{4,}(?:=|%3D){0,2})", re.IGNORECASE)


def masked(text: str) -> str:
    """Return a text with every secret replaced by ***."""
    if forms := _secret_forms():
        text = re.sub("|".join(map(re.escape, forms)), MASK, text)
    text = _HEADER.sub(lambda found: f"{found[1]}{found[2]}{found[3] or ''}{MASK}", text)
    text = _BEARER.sub(_mask_bearer, text)
    text = _BASIC.sub(_mask_basic, text)
    text = _masked_credentials(text)
    text = _CUT_CREDENTIALS.sub(rf"\1{MASK}", text)
    # Alone, %3F is a question mark in a path: that of a database, say.
    text = _ENCODED_URI.sub(lambda found: _ENCODED_QUERY.sub(_mask_query, found[0]), _QUERY.sub(_mask_query, text))
    text = _IN_MAPPING.sub(lambda found: _mask_named(found, found[2], f"{found[1]}{found[2]}{found[3]}"), text)
    for named in (_ASSIGNED, _ENCODED_NAMED):
        text = named.sub(lambda found: _mask_named(found, found[1], found[1] + found[2]), text)
    return text


def uris_masked(text: str) -> str:
    """Return a text with the credentials and the values of the queries of its addresses replaced by ***."""
    text = _URI.sub(lambda found: _QUERY.sub(_mask_query, found[0]), _masked_credentials(text))
    return _ENCODED_URI.sub(lambda found: _ENCODED_QUERY.sub(_mask_query, found[0]), text)


def masked_all(value: Any, mask: Callable[[str], str] = masked) -> Any:
    """Return a value with all text masked, also in nested lists and mappings; other values are unchanged."""
    match value:
        case str():
            return mask(value)
        case Mapping():
            return {masked_all(key, mask): masked_all(item, mask) for key, item in value.items()}
        case list() | tuple():
            return type(value)(masked_all(item, mask) for item in value)
        case _:
            return value


def _masked_credentials(text: str) -> str:
    return _ENCODED_CREDENTIALS.sub(rf"\1{MASK}\2", _CREDENTIALS.sub(rf"\1{MASK}@", text))


def _mask_query(found: re.Match[str]) -> str:
    return _ENCODED_VALUE.sub(rf"\1{MASK}", _QUERY_VALUE.sub(f"={MASK}", found[0]))


def _mask_named(found: re.Match[str], name: str, before: str) -> str:
    """Mask what follows a name, if the name is that of a secret."""
    return f"{before}{MASK}" if _is_secret(name) else found[0]


def _mask_bearer(found: re.Match[str]) -> str:
    """Mask what follows "Bearer"; in "the bearer of this" there is no token."""
    is_word = found[1] == "bearer" and found[3].isalpha() and len(found[3]) < _LINE
    return found[0] if is_word else f"{found[1]}{found[2]}{MASK}"


def _mask_basic(found: re.Match[str]) -> str:
    """Mask "user:password" in base64 after "Basic"; in "Basic information" there is none."""
    text = unquote(found[3])
    with_padding = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
    try:
        is_pair = b":" in base64.b64decode(with_padding, altchars=b"-_" if {"-", "_"} & set(text) else None)
    except (binascii.Error, ValueError):
        is_pair = False
    return f"{found[1]}{found[2]}{MASK}" if is_pair or text.endswith("=") else found[0]


def _secret_forms() -> list[str]:
    """Return what to mask of the environment, the longest first, because one may be the beginning of another."""
    values: set[str] = set()
    for name, value in os.environ.items():
        # A path says where a secret is.
        if _is_secret(name) and not _is_path(value):
            values |= {value, *(line for line in value.splitlines() if len(line) >= _LINE)}
        elif "://" in value:
            values.add(_password(value))
    shown = {value.strip() for value in values}
    told = {one for one in shown if len(one) >= _SHORTEST and one.lower() not in _HARMLESS_VALUES}
    return sorted({form for value in told for form in _forms(value)}, key=len, reverse=True)


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except OSError:
        return False


def _password(uri: str) -> str:
    try:
        return urlsplit(uri).password or ""
    except ValueError:
        return ""


@cache
def _forms(value: str) -> frozenset[str]:
    """Return a secret as it may stand in a text: itself, quoted, percent-encoded, in base64."""
    # The environment may hold bytes that are no text.
    in_bytes = value.encode(errors="surrogateescape")
    encoded = {quote(in_bytes, safe=""), quote(in_bytes), quote_plus(in_bytes)}
    encoded |= {_with_lower_digits(one) for one in encoded}
    encoded |= {quote(one, safe="") for one in encoded}
    encoded |= {_with_lower_digits(one) for one in encoded}
    base64s = {base64.b64encode(in_bytes).decode().rstrip("=")}
    url_safe = {one.translate(str.maketrans("+/", "-_")) for one in base64s | {value}}
    standard = {value.translate(str.maketrans("-_", "+/"))} if re.fullmatch(r"[\w-]+=*", value, re.ASCII) else set()
    quoted = {
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        html.escape(value),
        " ".join(value.split()),
    }
    return frozenset({value, unquote(value)} | encoded | base64s | url_safe | standard | quoted)


def _with_lower_digits(encoded: str) -> str:
    """Return a percent-encoded text as other programs write it: %2f for %2F."""
    return re.sub(r"%(?:25)*[0-9A-F]{2}", lambda found: found[0].lower(), encoded)


@cache
def _is_secret(name: str) -> bool:
    """Return whether what has this name is secret; every line that is printed asks this for every variable."""
    words = [word.upper() for word in _PARTS_OF_A_NAME.findall(name)]
    if not words or _SPECIAL_TOKEN.fullmatch(name) or words[-1] in _OF_SOMETHING_ELSE:
        return False
    in_one = "".join(words)
    return in_one.endswith(_ENDINGS) or bool(_WORDS & set(words)) or (len(words) > 1 and words[-1] in _LAST_WORDS)
