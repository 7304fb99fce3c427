"""Lets a written model cut text as its source does, and checks that it does.

Transformers picks the class of a tokenizer by the type of the model, the class that tokenizer_config.json names, and
tables that know no pruned model. So the source's tokenizer is loaded as a user loads it, and the written files are
changed as little as makes transformers build the same one from them.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slimllm_ops.checkpoint.companions import Companions, copy_data
from slimllm_ops.errors import CheckpointError, ReadBackError, shown
from slimllm_ops.files import cannot_be_read, open_plain, read_json_object, require_plain, write_json

# Loading it takes time, and many processes write no tokenizer.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
# The largest tokenizer_config.json that is read, in bytes.
MOST_SETTINGS = 1 << 24
# A directory without any of these has no tokenizer, though transformers may load an empty one from it.
VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.spm", "*.bpe")
# The files that transformers may read as it loads a tokenizer, and the largest of them that it may read.
READ = ("*.json", "*.txt", "*.jinja", "tokenizer*", "vocab*", "merges*", *VOCABULARIES, "additional_chat_templates/*")
MOST_BYTES = 1 << 27
# The class that builds exactly what tokenizer.json says, by the name that all versions of transformers know.
PLAIN = "PreTrainedTokenizerFast"
PLAIN_NAMES = ("TokenizersBackend", PLAIN)

PROBES = (
    "",
    " ",
    "Hello world",
    "It's 2023 and 650841823 people, we'll say they've   waited 3.14159 s.",
    " leading and trailing \t\n\r\n\n  spaces  ",
    "def f(x):\n    return x**2  # CamelCase_and_snake\n\tnot None",
    "naïve café, ZÜRICH, İstanbul, Ελληνικά, русский, עברית, العربية, हिन्दी, ภาษาไทย",
    "東京は日本の首都です。한국어 문장. 12\uff13\uff14",
    "e\u0301 \ufb01 \u00bd \u2126 \u200b\u00a0\u3000 \U0001f469\u200d\U0001f4bb\U0001f1e8\U0001f1ed \x00\x07",
    "<s>a</s> <unk><pad> <|endoftext|> <|im_start|>user<|im_end|> [INST] x [/INST] <bos><eos> ▁under ĠG",
)


@dataclass(frozen=True)
class _Loaded:
    """A tokenizer and what it does."""

    tokenizer: "PreTrainedTokenizerBase"
    behaviour: dict[str, Any]

    def difference(self, directory: Path) -> str:
        """Return what a written tokenizer does differently; "" if it does the same."""
        try:
            found = _load(directory).behaviour
        except CheckpointError as error:
            return str(error)
        return ", ".join(name for name, value in self.behaviour.items() if found[name] != value)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a vocabulary."""
    return any(fnmatch(path.name, pattern) for path in directory.iterdir() for pattern in VOCABULARIES)


def lacks_package(directory: Path) -> str:
    """Return which package a directory's vocabulary needs, and that it is not installed; "" if that is not so.

    Transformers takes every file that it cannot read for one of tiktoken, and asks for that package.
    """
    if find_spec("sentencepiece") is not None or (directory / "tokenizer.json").exists():
        return ""
    for path in directory.glob("*.model"):
        with suppress(OSError), open_plain(path) as file:
            # tiktoken's files are text, and SentencePiece's are messages that begin with their first piece.
            if file.read(1) == b"\n":
                return f"{path.name} is SentencePiece's, and that package is not installed: pip install sentencepiece"
    return ""


def read_settings(directory: Path) -> dict[str, Any]:
    """Return what a directory's tokenizer_config.json says; nothing if there is none.

    Raises:
        CheckpointError: It is broken.
    """
    path = directory / SETTINGS
    return read_json_object(path, MOST_SETTINGS) if path.exists() else {}


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer as a user does, without running code of the directory.

    Raises:
        CheckpointError: One of its files is none that can be read.
        Exception: Transformers raises a dozen kinds of errors for broken files, and a Rust panic is not even one.
    """
    from transformers import AutoTokenizer

    _require_files(directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _require_files(directory: Path) -> None:
    """Check that what transformers may read in a directory are plain files of a likely size."""
    for path in sorted({path for pattern in READ for path in directory.glob(pattern)}):
        try:
            if not path.is_dir():
                require_plain(path, MOST_BYTES)
        except FileNotFoundError:
            # Transformers passes over a broken link.
            continue
        except OSError as error:
            raise cannot_be_read(path, error) from error
    if read_settings(directory).get("gguf_file") is not None:
        raise CheckpointError(
            f"{directory / SETTINGS} names a gguf_file, from which transformers would read the tokenizer, wherever it "
            f"is: remove the setting"
        )


def _load(directory: Path) -> _Loaded:
    """Load a tokenizer, and look at what it does.

    Raises:
        CheckpointError: It does not load, or cannot read text.
    """
    try:
        tokenizer = load_tokenizer(directory)
        return _Loaded(tokenizer, _behaviour(tokenizer))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = lacks_package(directory) or shown(" ".join(str(error).split()), 160)
        raise CheckpointError(f"the tokenizer in {directory} does not load ({reason})") from error


def _load_if_possible(directory: Path) -> _Loaded | None:
    """Load a tokenizer as a user does; return None if there is none, or if it does not load."""
    if has_tokenizer(directory):
        with suppress(CheckpointError):
            return _load(directory)
    return None


def rehearse(companions: Companions, config: dict[str, Any]) -> str | None:
    """Write a model's tokenizer for trial; return a line if it can only be copied and not checked, else None.

    Args:
        companions: The files that come along.
        config: The config of the model that will be written.

    Raises:
        CheckpointError: No way to write it gives the source's tokenizer.
    """
    read_settings(companions.directory)
    if not has_tokenizer(companions.directory):
        return None
    try:
        _load(companions.directory)
    except CheckpointError as error:
        if _own_code(companions.directory):
            return (
                f"{error}: it needs Python code of the model, which does not come along; its files do, not checked and "
                f"without the name of that code, so load the tokenizer from {companions.directory}"
            )
        return f"{error}: its files are copied as they are, and not checked"
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        companions.copy(directory)
        write_json(directory / "config.json", config)
        settle(companions.directory, directory)
    return None


def settle(source: Path, written: Path) -> None:
    """Change the copied files of a tokenizer as little as makes transformers build the source's tokenizer from them.

    Args:
        source: The directory that the files come from.
        written: The directory that has copies of them, and its own config.json.

    Raises:
        CheckpointError: No change does; what the last one still gets wrong is named.
    """
    expected = _load_if_possible(source)
    if expected is None:
        return
    differing = "its class"
    for change in _changes(expected.tokenizer, read_settings(written)):
        change(written)
        differing = expected.difference(written)
        if not differing:
            return
    raise CheckpointError(
        f"the tokenizer in {source} cannot be written so that transformers loads the same ({differing} would differ): "
        f"save it with its save_pretrained, or remove its files to write the weights alone"
    )


def require_same(source: Path, written: Path) -> None:
    """Check that a written model has its source's tokenizer; nothing to check if the source's does not load.

    Raises:
        ReadBackError: It has another.
    """
    expected = _load_if_possible(source)
    if expected is None:
        return
    if differing := expected.difference(written):
        raise ReadBackError(
            f"the tokenizer as written in {written} differs from that in {source} ({differing}): "
            f"the disk is at fault, or this is a bug worth reporting"
        )


def same_vocabulary(first: Path, second: Path) -> bool:
    """Return whether two directories' tokenizers give the same words the same ids, as far as both load."""
    loaded = (_load_if_possible(first), _load_if_possible(second))
    vocabularies = [one.tokenizer.get_vocab() for one in loaded if one is not None]
    return len(vocabularies) < 2 or vocabularies[0] == vocabularies[1]


def _changes(expected: "PreTrainedTokenizerBase", settings: dict[str, Any]) -> Iterator[Callable[[Path], None]]:
    """Yield changes to the copied files, from the smallest to the largest."""
    named = settings.get("tokenizer_class")
    if isinstance(named, str):
        yield lambda written: None
    called = type(expected).__name__
    changed = settings | {"tokenizer_class": PLAIN if called in PLAIN_NAMES else called}
    yield lambda written: write_json(written / SETTINGS, changed, indent=2)
    yield lambda written: _save_plainly(expected, written)


def _save_plainly(tokenizer: "PreTrainedTokenizerBase", written: Path) -> None:
    """Write what a tokenizer does into tokenizer.json, whatever its class does to that file."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            copy_data(path, written / path.name)
    changed = read_settings(written) | {"tokenizer_class": PLAIN, "model_input_names": tokenizer.model_input_names}
    # The file holds what the flag asked for.
    changed.pop("fix_mistral_regex", None)
    write_json(written / SETTINGS, changed, indent=2)


def _behaviour(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what a tokenizer does: all of its rules if it has a description of them, settings, and some results."""
    asked = [(text, special) for text in PROBES for special in (True, False)]
    ids = [tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] for text, special in asked]
    settings = ("padding_side", "truncation_side", "model_max_length", "model_input_names", "chat_template")
    return {
        "its rules": _rules(tokenizer),
        "its special tokens": (tokenizer.special_tokens_map, sorted(tokenizer.all_special_ids)),
        "its vocabulary": len(tokenizer),
        **{name: getattr(tokenizer, name, None) for name in settings},
        "token ids": ids,
        "decoded text": [tokenizer.decode(one) for one in ids],
    }


def _rules(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if hasattr(backend, "to_str") else None


def _own_code(directory: Path) -> bool:
    with suppress(CheckpointError):
        return "auto_map" in read_settings(directory)
    return False
