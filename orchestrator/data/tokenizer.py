"""Loads a model's tokenizer, lets it render chats, and names its faults."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from orchestrator.data.blocks import DataError
from orchestrator.data.files import error_line
from slimllm_ops.checkpoint import tokenizer as tokenizers

T = TypeVar("T")
# The characters that are tokenised at once, in parallel.
BATCH_CHARACTERS = 1 << 20
_TOKEN_BLOCKS = "add its files, or give token blocks (input_ids in a .parquet, .arrow or .jsonl file), which need none"


def load_tokenizer(spec: str, model_dir: Path, remedy: str = _TOKEN_BLOCKS) -> PreTrainedTokenizerBase:
    """Return the tokenizer that reads a text for a model.

    Args:
        spec: The source of the text, for errors.
        model_dir: The model's directory.
        remedy: What to do if there is none, for errors.

    Raises:
        DataError: There is none, or it has no vocabulary.
    """
    failed = f"{spec} is text, and {model_dir} has no tokenizer that loads"
    with _naming_missing_package(failed, model_dir), naming_tokenizer_failure(failed, remedy):
        tokenizer = tokenizers.load_tokenizer(model_dir)
        # In many families, a folder without tokenizer files loads as an empty tokenizer, which drops every word.
        empty = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
        if empty:
            raise DataError(f"{spec} is text, and the tokenizer in {model_dir} has no vocabulary: {remedy}")
    return tokenizer


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    where: str,
    *,
    asks: bool = False,
) -> str:
    """Return what the tokenizer's chat template makes of messages.

    Args:
        tokenizer: The tokenizer.
        messages: The messages, at least one.
        tools: Descriptions of the tools that the assistant may call.
        where: The place of the chat, which begins every error.
        asks: Whether the text goes on with what the template puts before an answer.

    Raises:
        DataError: There is no template, or it does not take the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a chat, and the tokenizer in {tokenizer.name_or_path} has no chat template: "
            f"add one to the model's directory (chat_template.jinja), or give rows without chats"
        )
    with naming_template_failure(tokenizer, where):
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks))


@contextmanager
def naming_template_failure(tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[None]:
    """Turn any error of a chat template into a one-line DataError."""
    refused = f"{where}: the chat template in {tokenizer.name_or_path} does not take the messages"
    with naming_tokenizer_failure(refused, "fix or drop the row"):
        yield


@contextmanager
def _naming_missing_package(failed: str, model_dir: Path) -> Iterator[None]:
    """Say which package is missing, if that is why a tokenizer does not load."""
    try:
        yield
    except DataError as error:
        if lacks := tokenizers.lacks_package(model_dir):
            raise DataError(f"{failed}: {lacks}") from error
        raise


@contextmanager
def naming_tokenizer_failure(what: str, remedy: str) -> Iterator[None]:
    """Turn any tokenizer error into a one-line DataError; the files are untrusted and may hold anything."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    # Catch everything: Transformers raises a dozen kinds of errors, and a Rust panic is not an Exception.
    except BaseException as error:
        raise DataError(f"{what} ({error_line(error)}): {remedy}") from error


def batches(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items in lists, each of which has as many characters as are tokenised at once, or a few more."""
    batch: list[T] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += length(item)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
