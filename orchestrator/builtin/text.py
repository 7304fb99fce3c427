"""Text that every Python installation has: the language's own documentation and the standard library's sources.

Each document belongs to one of three parts, by a hash of its name, so that the parts stay disjoint from one Python
version to the next: the module a model was trained on under 3.11 is never held out under 3.13. The contents follow
the installed Python; a run that must be repeated elsewhere to the last digit needs the same Python there.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

# What some distributions leave out (Debian packages it apart) or Python removed since 3.11.
_OFTEN_ABSENT = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtle", "turtledemo"}
_OTHERS_CODE = {"dist-packages", "site-packages", "sitecustomize", "usercustomize"}
_TABLES = {"__phello__", "encodings", "entities", "pydoc_data", "this"}
_SKIPPED = _OFTEN_ABSENT | _OTHERS_CODE | _TABLES

# Modules that share much of their text.
_TWINS = {"ntpath": "posixpath", "aifc": "wave", "sunau": "wave"}

# Chosen once, so that both samples hold prose as well as code and no package fills one. Another value is another
# split: the model in `model/` has then seen what is held out.
_SALT = "48"

# Of 256 values of the hash's first byte: the first to calibration, the next to the held-out part, the rest to training.
_CALIBRATION_END = 24
_HELDOUT_END = 48

# A document of a sample is cut here, so that one long module does not fill it.
_SAMPLE_CHARACTERS = 16_384


def training_text() -> list[str]:
    """The documents that the built-in model is trained on, whole."""
    return [text for byte, text in _documents() if byte >= _HELDOUT_END]


def calibration_text() -> list[str]:
    """Documents to calibrate on: unseen in training, none of them in `heldout_text`."""
    return [_cut(text) for byte, text in _documents() if byte < _CALIBRATION_END]


def heldout_text() -> list[str]:
    """Documents to measure perplexity on: unseen in training, none of them in `calibration_text`."""
    return [_cut(text) for byte, text in _documents() if _CALIBRATION_END <= byte < _HELDOUT_END]


def _documents() -> list[tuple[int, str]]:
    """Every document with the byte that places it, in the order of a hash: any prefix mixes prose and code."""
    keyed = []
    for family, name, text in (*_topics(), *_sources()):
        byte = hashlib.sha256(f"{_SALT} {family}".encode()).digest()[0]
        keyed.append((hashlib.sha256(name.encode()).hexdigest(), byte, text))
    return [(byte, text) for _, byte, text in sorted(keyed)]


def _topics() -> Iterator[tuple[str, str, str]]:
    """The pages that `help()` shows: (family, name, text), without those a longer page contains.

    Pages without a single long line are left out too: whether another page contains them cannot be told.
    """
    lines = {topic: {line for line in text.splitlines() if len(line) > 60} for topic, text in topics.items()}
    for topic, text in topics.items():
        if not any(lines[topic] < others for others in lines.values()):
            yield f"topic {topic}", f"topic {topic}", text


def _sources() -> Iterator[tuple[str, str, str]]:
    """The standard library's modules: (family, name, text); a package's modules are one family."""
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
    """The name that twins share: `_pydecimal` and `decimal`, `pathlib` and `pathlib/_local`."""
    module = name.partition("/")[0].removeprefix("_py").lstrip("_")
    return _TWINS.get(module, module)


def _cut(text: str) -> str:
    """At most `_SAMPLE_CHARACTERS` of a text, ending with a line."""
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    return text[: text.rindex("\n", 0, _SAMPLE_CHARACTERS) + 1]
