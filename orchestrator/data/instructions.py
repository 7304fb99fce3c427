"""Turns rows of prompts and responses into texts, and says where in them the responses stand.

| columns | text | responses |
|---|---|---|
| messages, or conversations; tools if there are any | what the chat template makes of them | the assistant's turns |
| instruction, output; input if it is not empty | Alpaca's prompt, then the output | the output |
| prompt, completion | one after the other | the completion |
| prompt, completion of messages | what the chat template makes of both | the assistant's turns in the completion |

The first line of this table whose columns a row has decides. A turn that opens a chat answers nothing, and is none.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from orchestrator.data.blocks import DataError
from orchestrator.data.chats import ASSISTANT, ChatReader, Message, Span, answers
from orchestrator.data.documents import read_places
from orchestrator.data.files import MOST_EMPTY, list_names
from orchestrator.data.forms import RUNNING, form_of
from orchestrator.data.rows import (
    INSTRUCTIONS,
    Row,
    RowForm,
    check_text,
    columns_to_read,
    form_of_row,
    messages_of,
    string_of,
    tools_of,
)
from orchestrator.data.tables import table_columns

REMEDY = "give rows of 'instruction' and 'output', of 'prompt' and 'completion', or of 'messages'"
_PAIRS = tuple(form.needed for form in INSTRUCTIONS if len(form.needed) > 1)
# What is read of rows that lack a side, so that the error can name the first one.
_SIDES = tuple(RowForm((name,)) for pair in _PAIRS for name in pair)


class Instruction(NamedTuple):
    """A text with prompts and responses.

    Attributes:
        text: The text.
        responses: Where the responses stand in it; none if no response says anything.
        is_chat: Whether a chat template put the special tokens in already.
    """

    text: str
    responses: tuple[Span, ...]
    is_chat: bool


def alpaca_prompt(instruction: str, given: str) -> str:
    """Return the prompt for an instruction, in the form that Alpaca gave it; what is given for it may be empty."""
    context = ", paired with an input that provides further context" if given else ""
    parts = [
        f"Below is an instruction that describes a task{context}. "
        f"Write a response that appropriately completes the request.",
        f"### Instruction:\n{instruction}",
        *([f"### Input:\n{given}"] if given else []),
        "### Response:\n",
    ]
    return "\n\n".join(parts)


def read_instructions(
    spec: str, path: Path | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, Instruction]]:
    """Yield the number and the text of each row that the spec names, in order, but for those with an empty response.

    Args:
        spec: The source.
        path: Its file or folder; None for a built-in text or a dataset of the hub.
        tokenizer: The tokenizer whose chat template renders chats.

    Raises:
        DataError: The source has no rows of prompts and responses, a row lacks the one or the other, or all responses
            are empty.
    """
    _require_rows(spec, path)
    chats = ChatReader(tokenizer)
    found, kept, empty = 0, 0, 0
    for found, (where, row) in enumerate(read_places(spec, path, _columns), start=1):
        instruction = instruction_of(row, where, chats)
        if instruction.responses:
            kept, empty = kept + 1, 0
            yield found - 1, instruction
        elif (empty := empty + 1) > MOST_EMPTY:
            raise DataError(f"{spec}: more than {MOST_EMPTY:,} rows with empty responses follow each other: drop them")
    if not found:
        raise DataError(f"{spec}: no rows in it: {REMEDY}")
    if not kept:
        raise DataError(f"{spec}: the responses of all rows ({found:,}) are empty: give rows whose responses have text")


def _columns(names: Iterable[str]) -> list[str]:
    names = set(names)
    return columns_to_read(names, INSTRUCTIONS) or columns_to_read(names, _SIDES)


def _require_rows(spec: str, path: Path | None) -> None:
    """Raise DataError if a source has no rows of prompts and responses, by its name or its columns."""
    if spec.startswith("builtin:") or (path is not None and form_of(path) in RUNNING):
        raise DataError(f"{spec} is text without prompts and responses: {REMEDY}")
    names = table_columns(path) if path is not None else []
    if names and not _columns(names):
        raise _no_instruction(str(path), names)


def instruction_of(row: Row, where: str, chats: ChatReader) -> Instruction:
    """Return the text of a row, and where its responses stand in it.

    Raises:
        DataError: It lacks the prompt or the response, or they cannot be used.
    """
    form = form_of_row(row, INSTRUCTIONS)
    if form is None:
        raise _one_sided(row, where) or _no_instruction(where, row)
    if form.needed[0] == "instruction":
        given = string_of(row, "input", where) if row.get("input") is not None else ""
        return _answered(alpaca_prompt(string_of(row, "instruction", where), given), row, "output", where)
    if form.needed[0] != "prompt":
        return _chat([], messages_of(row, form.needed[0], where), row, where, chats)
    if isinstance(row["prompt"], list):
        prompt, completion = (messages_of(row, column, where) for column in form.needed)
        return _chat(prompt, completion, row, where, chats)
    return _answered(string_of(row, "prompt", where), row, "completion", where)


def _answered(prompt: str, row: Row, column: str, where: str) -> Instruction:
    response = string_of(row, column, where)
    if not response.strip():
        return Instruction("", (), is_chat=False)
    check_text(prompt + response, where)
    return Instruction(prompt + response, ((len(prompt), len(prompt + response)),), is_chat=False)


def _chat(prompt: list[Message], completion: list[Message], row: Row, where: str, chats: ChatReader) -> Instruction:
    messages = [*prompt, *completion]
    given = len(prompt) or int(messages[0]["role"] == ASSISTANT)
    if not any(message["role"] == ASSISTANT for message in messages[given:]):
        roles = list_names(dict.fromkeys(message["role"] for message in messages))
        raise DataError(
            f"{where} has a prompt and no response: none of its messages ({roles}) is an answer of the role "
            f"{ASSISTANT!r}: add one, or drop the row"
        )
    places = [place for place in range(given, len(messages)) if answers(messages[place])]
    if not places:
        return Instruction("", (), is_chat=True)
    # What follows the last answer is no part of any prompt.
    text, spans = chats.read(messages[: places[-1] + 1], tools_of(row, where), given, where)
    return Instruction(text, tuple(spans), is_chat=True)


def _one_sided(row: Row, where: str) -> DataError | None:
    """Return the error for a row that has a prompt without a response, or the reverse; None if it has neither."""
    for pair in _PAIRS:
        has = [name for name in pair if name in row]
        if has:
            (lacks,) = set(pair) - set(has)
            return DataError(
                f"{where} has {has[0]!r} and no {lacks!r} among the columns ({list_names(row)}): "
                f"name the column of the {'response' if lacks == pair[1] else 'prompt'} so, or drop the row"
            )
    return None


def _no_instruction(where: str, names: Iterable[str]) -> DataError:
    return DataError(f"{where}: no prompt and no response among the columns ({list_names(names)}): {REMEDY}")
