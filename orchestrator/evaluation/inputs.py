"""Finds and checks what `evaluate` reads: the models and the texts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from orchestrator.data import DataError, TextOptions, TokenBlocks, load_tokens
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.evaluation.config import EvaluateConfig
from orchestrator.evaluation.windows import Windows, cut_windows
from orchestrator.inputs import BUILTIN_HELDOUT, model_names
from orchestrator.sources import storage
from orchestrator.sources.models import resolve_model
from slimllm_ops.checkpoint.resolution import weight_files
from slimllm_ops.checkpoint.tokenizer import same_vocabulary
from slimllm_ops.checkpoint.whole import WholeModel, inspect_whole
from slimllm_ops.errors import InputError
from slimllm_ops.files import digest_files
from slimllm_ops.stream.padding import count_tokens


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate.

    Attributes:
        name: Its name in tables.
        whole: Its directory and sizes.
        comparable: Whether it has the first model's vocabulary, so that predictions can be compared.
    """

    name: str
    whole: WholeModel
    comparable: bool = True

    @property
    def directory(self) -> Path:
        """The model's directory."""
        return self.whole.directory

    @cached_property
    def digest(self) -> str:
        """The digest of the model's weight files."""
        return digest_files(self.directory, weight_files(self.directory))


@dataclass(frozen=True, eq=False)
class Text:
    """A text in windows of one length, cut by one tokenizer.

    Attributes:
        blocks: Its tokens.
        windows: The windows.
        stride: Tokens between the starts of two windows.
        num_bytes: The bytes of text, in UTF-8, that the counted tokens stand for; None for rows of tokens.
    """

    blocks: TokenBlocks
    windows: Windows
    stride: int
    num_bytes: int | None

    @property
    def length(self) -> int:
        """The tokens of a window."""
        return self.windows.ids_WT.shape[1]


@dataclass(frozen=True)
class EvaluationInputs:
    """The models, the first of them to compare with, and the texts by the model whose tokenizer cut them."""

    models: tuple[Evaluated, ...]
    texts: dict[str, tuple[Text, ...]]

    @property
    def first(self) -> Evaluated:
        """The model that the others are compared with."""
        return self.models[0]

    def texts_of(self, model: Evaluated) -> tuple[Text, ...]:
        """Return the texts as a model's tokenizer cuts them."""
        return self.texts[(self.first if model.comparable else model).name]


def load_evaluation_inputs(config: EvaluateConfig, warn: Callable[[str], None]) -> EvaluationInputs:
    """Find the models and cut the texts; warn of what the user may not expect.

    Raises:
        CheckpointError: A model is missing, broken or no causal language model.
        DataError: A text cannot be used.
    """
    models = _load_models(config, warn)
    specs = config.data or (() if config.tasks else (BUILTIN_HELDOUT,))
    if specs and not config.data:
        warn(f"perplexity is measured on {BUILTIN_HELDOUT}, Python's documentation: pass your own text as --data SPEC")
    limits = [one.whole.max_length for one in models if one.whole.max_length is not None]
    lengths = dict.fromkeys(min(length, *limits) for length in config.length)
    tokenizers = [one for number, one in enumerate(models) if number == 0 or not one.comparable]
    return EvaluationInputs(models, {one.name: _load_texts(config, one, specs, list(lengths)) for one in tokenizers})


def _load_models(config: EvaluateConfig, warn: Callable[[str], None]) -> tuple[Evaluated, ...]:
    models: list[Evaluated] = []
    for spec, name in zip(config.models, model_names(config.models), strict=True):
        directory = resolve_model(spec).directory
        with storage.naming_uri(spec, directory, InputError):
            found = Evaluated(name, inspect_whole(directory))
        if models and not _same_tokens(models[0].whole, found.whole):
            warn(
                f"{found.name} has another vocabulary than {models[0].name}, so they have no KL divergence and no "
                f"agreement: compare bits per byte"
            )
            found = replace(found, comparable=False)
        models.append(found)
    return tuple(models)


def _same_tokens(first: WholeModel, other: WholeModel) -> bool:
    return first.vocab_size == other.vocab_size and same_vocabulary(first.directory, other.directory)


def _load_texts(
    config: EvaluateConfig, model: Evaluated, specs: tuple[str, ...], lengths: list[int]
) -> tuple[Text, ...]:
    texts: dict[tuple[str, int], Text] = {}
    for spec in specs:
        for length in lengths:
            text = _load_text(config, model.whole, spec, length)
            # Rows of tokens have their own length.
            texts.setdefault((spec, text.length), text)
    return tuple(texts.values())


def _load_text(config: EvaluateConfig, model: WholeModel, spec: str, length: int) -> Text:
    blocks = load_tokens(
        spec,
        model_dir=model.directory,
        vocab_size=model.vocab_size,
        max_length=model.max_length or length,
        options=TextOptions(samples=None, sequence_length=length, tokens=config.tokens),
    )
    if config.stride is not None and blocks.source_digest is None:
        raise DataError(f"{spec} has rows of tokens, and a stride is for running text: leave the stride out")
    if not count_tokens(blocks.input_ids_BT[:, 1:]):
        raise DataError(f"{spec} has rows of one token: perplexity needs at least two")
    windows = cut_windows(blocks.input_ids_BT, config.stride)
    num_bytes = None if blocks.source_digest is None else _count_bytes(spec, model, windows)
    return Text(blocks, windows, config.stride or blocks.input_ids_BT.shape[1], num_bytes)


def _count_bytes(spec: str, model: WholeModel, windows: Windows) -> int:
    """Return the bytes of text, in UTF-8, that the counted tokens of a text stand for."""
    tokenizer = load_tokenizer(spec, model.directory)
    # A token's text depends on what stands before it, so the window is decoded, and its start that is not counted.
    first_W = windows.counted_WT.argmax(axis=1) + 1
    whole = tokenizer.batch_decode(windows.ids_WT.tolist(), skip_special_tokens=True)
    starts = [row[:first].tolist() for row, first in zip(windows.ids_WT, first_W, strict=True)]
    before = tokenizer.batch_decode(starts, skip_special_tokens=True)
    return sum(len(one.encode()) - len(other.encode()) for one, other in zip(whole, before, strict=True))
