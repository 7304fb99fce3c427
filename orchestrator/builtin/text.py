"""Reads text that every Python installation has: the language's documentation and the standard library's sources.

A hash of its name assigns each document to one of three parts. So the parts stay disjoint across Python versions: a
module that a model was trained on under 3.11 is never held out under 3.13. The contents follow the installed Python;
to repeat a run elsewhere to the last digit, use the same Python there.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

# Modules that some distributions leave out (Debian packages them separately) or that Python removed since 3.11.
_OFTEN_ABSENT = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtle", "turtledemo"}
_OTHERS_CODE = {"dist-packages", "site-packages", "sitecustomize", "usercustomize"}
_TABLES = {"__phello__", "encodings", "entities", "pydoc_data", "this"}
_SKIPPED = _OFTEN_ABSENT | _OTHERS_CODE | _TABLES

# Modules that share much of their text.
_TWINS = {"ntpath": "posixpath", "aifc": "wave", "sunau": "wave"}

# Chosen once, so that both samples hold prose and code and no package fills one. Another value gives another split:
# the model in `model/` would then have been trained on held-out text.
_SALT = "48"

# Ranges of the hash's first byte, of 256 values: calibration comes first, then the held-out part, then training.
_CALIBRATION_END = 24
_HELDOUT_END = 48

# Documents of a sample are cut here, so that one long module does not fill the sample.
_SAMPLE_CHARACTERS = 16_384


def training_text() -> list[str]:
    """Return the documents that the built-in model is trained on, uncut."""
    return [text for byte, text in _documents() if byte >= _HELDOUT_END]


def calibration_text() -> list[str]:
    """Return the documents to calibrate on; none is in the training text or in `heldout_text`."""
    return [_cut(text) for byte, text in _documents() if byte < _CALIBRATION_END]


def heldout_text() -> list[str]:
    """Return the documents to measure perplexity on; none is in the training text or in `calibration_text`."""
    return [_cut(text) for byte, text in _documents() if _CALIBRATION_END <= byte < _HELDOUT_END]


def _documents() -> list[tuple[int, str]]:
    """Return all documents, with the bytes that assign their parts, in hash order: any prefix mixes prose and code."""
    keyed = []
    for family, name, text in (*_topics(), *_sources()):
        byte = hashlib.sha256(f"{_SALT} {family}".encode()).digest()[0]
        keyed.append((hashlib.sha256(name.encode()).hexdigest(), byte, text))
    return [(byte, text) for _, byte, text in sorted(keyed)]


def _topics() -> Iterator[tuple[str, str, str]]:
    """Yield the pages that `help()` shows as (family, name, text), except those that a longer page contains.

    Pages without a single long line are left out too: it is impossible to tell whether another page contains them.
    """
    lines = {topic: {line for line in text.splitlines() if len(line) > 60} for topic, text in topics.items()}
    for topic, text in topics.items():
        if not any(lines[topic] < others for others in lines.values()):
            yield f"topic {topic}", f"topic {topic}", text


def _sources() -> Iterator[tuple[str, str, str]]:
    """Yield the standard library's modules as (family, name, text); a package's modules are one family."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = [path.parent for path in library.glob("*/__init__.py") if path.parent.name not in _SKIPPED]
    paths = [path for folder in packages for path in folder.rglob("*.py")] + list(library.glob("*.py"))
    if not paths:
        raise FileNotFoundError(
            f"The built-in text is the standard library's sources; found none in {library}. "
            "Use a Python installed with its sources, or give a text file of your own."
        )
    for path in paths:
        module = path.relative_to(library).with_suffix("")
        text = path.read_text(encoding="utf-8", errors="replace")
        if text and _SKIPPED.isdisjoint(module.parts) and not module.name.startswith("_sysconfigdata"):
            name = module.as_posix().removesuffix("/__init__")
            yield f"module {_family(name)}", f"module {name}", text


def _family(name: str) -> str:
    """Return the name that twins share: `_pydecimal` and `decimal`, `pathlib` and `pathlib/_local`."""
    module = name.partition("/")[0].removeprefix("_py").lstrip("_")
    return _TWINS.get(module, module)


def _cut(text: str) -> str:
    """Return at most `_SAMPLE_CHARACTERS` of a text; the cut is at the end of a line."""
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    return text[: text.rindex("\n", 0, _SAMPLE_CHARACTERS) + 1]
