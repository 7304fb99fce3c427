"""Translates a checkpoint's tokenizer to GGUF: tokens, their types, merges or scores, and special tokens.

llama.cpp tokenizes text itself. Two of its algorithms are supported here. `gpt2` cuts the text by a regular expression
that it knows by name, then merges bytes by rank. `llama` is SentencePiece's: blanks become ▁, the pair whose token has
the highest score is merged first, and text that no token covers becomes bytes. Any other tokenizer is refused, because
llama.cpp would feed the model wrong tokens.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm_ops.checkpoint.tokenizer import load_tokenizer
from slimllm_ops.errors import CheckpointError, InputError, shown

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# GGUF's numbers for the types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of each regular expression, and whether it leaves a word whole that is itself a token.
EXPRESSIONS = {_CUT % "{1,3}": ("llama-bpe", True), _CUT % "": ("qwen2", False)}
BLANK = "▁"
_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREPENDED = {"type": "Prepend", "prepend": BLANK}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer as a GGUF file describes it; by default there is none.

    Attributes:
        model: llama.cpp's name of the algorithm.
        tokens: The token of each id.
        types: The type of each id.
        settings: All other settings, by the names of the writer's methods without `add_`.
    """

    model: str = "none"
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def add_to(self, writer: Any) -> None:
        """Add the vocabulary to a GGUF writer."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        for name, value in self.settings.items():
            getattr(writer, f"add_{name}")(value)


def read_vocabulary(directory: Path, config: PretrainedConfig) -> Vocabulary:
    """Return the vocabulary of a model directory, or an empty one if there are no tokenizer files.

    Raises:
        CheckpointError: The tokenizer does not load.
        InputError: llama.cpp does not know this kind of tokenizer.
    """
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return Vocabulary()
    tokenizer = _load(directory)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    refused = _Refusal(directory)
    model = described["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise refused(f"it is of type {model['type']} with {len(model.get('merges', []))} merges")
    if model["byte_fallback"]:
        kind, settings = "llama", _sentencepiece(described, config.vocab_size, refused)
    else:
        kind, settings = "gpt2", _byte_level(described, refused)
    tokens, types = _tokens(described, config.vocab_size, kind, refused)
    settings |= _special(tokenizer, config, refused)
    return Vocabulary(model=kind, tokens=tokens, types=types, settings=settings)


@dataclass(frozen=True)
class _Refusal:
    """A function that makes the error for a tokenizer that GGUF cannot describe."""

    directory: Path

    def __call__(self, reason: str) -> InputError:
        return InputError(
            f"the tokenizer in {self.directory} cannot be written to a GGUF file: {reason}; remove its files to write "
            f"the weights without a vocabulary"
        )


def _load(directory: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = load_tokenizer(directory)
        tokenizer.backend_tokenizer.to_str()
    except (KeyboardInterrupt, SystemExit):
        raise
    # Catch everything: transformers raises a dozen kinds of errors, and a Rust panic is not an Exception.
    except BaseException as error:
        reason = shown(" ".join(str(error).split()), 200)
        raise CheckpointError(f"{directory} has no tokenizer that loads ({reason}): fix its files") from error
    return tokenizer


def _byte_level(described: dict[str, Any], refused: _Refusal) -> dict[str, Any]:
    """Return the settings of `gpt2`: the regular expression's name, and the merges by rank."""
    name, whole = _expression(described["pre_tokenizer"] or {}, refused)
    if described["model"]["ignore_merges"] != whole:
        raise refused(f"its ignore_merges is not what llama.cpp's {name} does")
    # llama.cpp does not normalize text. NFC is ignored, as in its own converter: most text is composed already.
    if (described["normalizer"] or {}).get("type", "NFC") != "NFC":
        raise refused(f"it has a normalizer of type {shown(str(described['normalizer']['type']))}")
    return {"tokenizer_pre": name, "token_merges": [" ".join(pair) for pair in described["model"]["merges"]]}


def _expression(pre: dict[str, Any], refused: _Refusal) -> tuple[str, bool]:
    """Return llama.cpp's name of the regular expression, and whether it leaves a word whole that is a token."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    *before, last = steps
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if not before and last["use_regex"]:
            return "gpt-2", False
        if len(before) == 1 and before[0]["type"] == "Split" and not last["use_regex"]:
            found = EXPRESSIONS.get(before[0]["pattern"].get("Regex"))
            if found and before[0]["behavior"] == "Isolated" and not before[0]["invert"]:
                return found
    known = ", ".join(["gpt-2", *(name for name, _ in EXPRESSIONS.values())])
    raise refused(f"it cuts text in a way for which no llama.cpp name is known here (known: {known})")


def _sentencepiece(described: dict[str, Any], vocab_size: int, refused: _Refusal) -> dict[str, Any]:
    """Return the settings of `llama`: scores that fall with merge rank, and whether a text begins with a blank."""
    model, scores = described["model"], [0.0] * vocab_size
    if model["ignore_merges"]:
        raise refused("it has both byte_fallback and ignore_merges")
    for rank, (first, second) in reversed(list(enumerate(model["merges"]))):
        # The first merge that makes a token counts.
        if (token := model["vocab"].get(first + second, vocab_size)) < vocab_size:
            scores[token] = -1.0 - rank
    return {"tokenizer_pre": "default", "token_scores": scores, "add_space_prefix": _begins_blank(described, refused)}


def _begins_blank(described: dict[str, Any], refused: _Refusal) -> bool:
    normalizer, pre = described["normalizer"], described["pre_tokenizer"]
    if pre is None and normalizer is not None:
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        if steps in ([_BLANKS], [_PREPENDED, _BLANKS]):
            return len(steps) == 2
    if normalizer is None and pre is not None and pre["type"] == "Metaspace" and not pre["split"]:
        return pre["prepend_scheme"] != "never"
    raise refused("it treats blanks differently from SentencePiece")


def _tokens(described: dict[str, Any], vocab_size: int, kind: str, refused: _Refusal) -> tuple[list[str], list[int]]:
    """Return the token and the type of each id; ids without a token are unused."""
    tokens = [f"[PAD{token}]" for token in range(vocab_size)]
    types = [UNUSED] * vocab_size
    unknown = described["model"]["unk_token"]
    added = {one["content"]: one for one in described["added_tokens"]}
    ids = described["model"]["vocab"] | {content: one["id"] for content, one in added.items()}
    if max(ids.values()) >= vocab_size:
        raise refused(f"it has a token id {max(ids.values())}, and the model's vocabulary has {vocab_size}")
    for content, token in ids.items():
        tokens[token], types[token] = content, NORMAL
        if kind == "llama" and content == unknown:
            types[token] = UNKNOWN
        elif content in added:
            types[token] = CONTROL if added[content]["special"] else USER_DEFINED
        elif kind == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", content):
            types[token] = BYTE
    if kind == "llama" and types.count(BYTE) != 256:
        raise refused(f"it has tokens for {types.count(BYTE)} of 256 bytes")
    return tokens, types


def _special(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, refused: _Refusal) -> dict[str, Any]:
    """Return the ids of special tokens, which of them are added to a text, and the chat template."""
    ids = {name: _special_id(tokenizer, config, name) for name in ("bos", "eos", "unk", "pad")}
    # Without one, llama.cpp takes another token of the vocabulary as the end, and stops there.
    if ids["eos"] is None:
        raise refused("it has no token that ends a text")
    plain, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    begins, ends = whole[:1] == [ids["bos"]] != plain[:1], whole[-1:] == [ids["eos"]] != plain[-1:]
    if whole != [ids["bos"]] * begins + plain + [ids["eos"]] * ends:
        raise refused("it adds tokens other than BOS and EOS to a text")
    settings: dict[str, Any] = {f"{name}_token_id": token for name, token in ids.items() if token is not None}
    settings |= {"add_bos_token": begins, "add_eos_token": ends}
    if isinstance(tokenizer.chat_template, str):
        settings["chat_template"] = tokenizer.chat_template
    return settings


def _special_id(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, name: str) -> int | None:
    """Return the id of a special token from the tokenizer, else the first one from the config."""
    token = getattr(tokenizer, f"{name}_token_id", None)
    if token is None:
        token = getattr(config, f"{name}_token_id", None)
    first = token[0] if isinstance(token, list) and token else token
    return first if isinstance(first, int) else None
