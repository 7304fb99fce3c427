"""Turns a row into a document: its text, or a text that is put together from several columns.

| columns | document |
|---|---|
| text | the text |
| messages, or conversations; tools if there are any | what the tokenizer's chat template makes of them |
| instruction, output; input if it is not empty | the parts under headings |
| prompt, completion | one after the other; if they are messages, what the chat template makes of them |

The first line of this table whose columns a row has decides.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from orchestrator.data.blocks import DataError
from orchestrator.data.files import LONGEST_DOCUMENT, list_names
from slimllm_ops.errors import shown

Row = Mapping[str, Any]
# Applies a chat template to messages and tools; the last argument is the row's place, for errors.
Render = Callable[[list[dict[str, Any]], list[Any] | None, str], str]

REMEDY = (
    "rename the one that has it, or give 'messages', 'instruction' and 'output', or 'prompt' and 'completion'; "
    "rows of 'input_ids' are read from files, where all rows have them"
)
_PARTS = (("instruction", "Instruction"), ("input", "Input"), ("output", "Response"))
# Names that some datasets have for the roles and keys of messages.
_ROLES = {"human": "user", "gpt": "assistant"}
_KEYS = {"from": "role", "value": "content"}


class Document(NamedTuple):
    """A text, and whether a chat template put the special tokens in already."""

    text: str
    is_chat: bool = False


def _from_text(row: Row, where: str, render: Render) -> Document:
    return Document(_string(row, "text", where))


def _from_messages(row: Row, where: str, render: Render) -> Document:
    return _chat(_messages(row, "messages", where), row, where, render)


def _from_conversations(row: Row, where: str, render: Render) -> Document:
    return _chat(_messages(row, "conversations", where), row, where, render)


def _from_instruction(row: Row, where: str, render: Render) -> Document:
    parts = []
    for column, heading in _PARTS:
        if column != "input" or row.get(column) is not None:
            text = _string(row, column, where)
            parts += [f"### {heading}:\n{text}"] if text or column != "input" else []
    return Document("\n\n".join(parts))


def _from_prompt(row: Row, where: str, render: Render) -> Document:
    if isinstance(row["prompt"], list):
        both = [*_messages(row, "prompt", where), *_messages(row, "completion", where)]
        return _chat(both, row, where, render)
    return Document(_string(row, "prompt", where) + _string(row, "completion", where))


# The columns that a row must have and those that it may have, and what makes a document of them.
_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Row, str, Render], Document]], ...] = (
    (("text",), (), _from_text),
    (("messages",), ("tools",), _from_messages),
    (("conversations",), ("tools",), _from_conversations),
    (("instruction", "output"), ("input",), _from_instruction),
    (("prompt", "completion"), ("tools",), _from_prompt),
)
COLUMNS = tuple(dict.fromkeys(name for needed, others, _ in _FORMS for name in (*needed, *others)))


def columns_to_read(names: Iterable[str]) -> list[str]:
    """Return those of a table's columns that make its documents; none if no form fits."""
    names = set(names)
    for needed, others, _ in _FORMS:
        if names.issuperset(needed):
            return [name for name in (*needed, *others) if name in names]
    return []


def document_of(row: Row, where: str, render: Render) -> Document:
    """Return the document of a row.

    Args:
        row: The values by column.
        where: The row's place, which begins every error.
        render: Applies the tokenizer's chat template.

    Raises:
        DataError: The row has none of these columns, or they do not hold text or messages.
    """
    for needed, _, make in _FORMS:
        if all(name in row for name in needed):
            document = make(row, where, render)
            _check_text(document.text, where)
            return document
    raise DataError(f"{where}: no 'text' among the columns ({list_names(row)}): {REMEDY}")


def without_nulls(row: Row) -> dict[str, Any]:
    """Return a row of a table whose messages lack what is null: tables give all messages the same keys."""
    return {name: _without_nulls(value) if name != "text" else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        # A message without content is a call of a tool: templates look whether its content is null.
        return {key: _without_nulls(one) for key, one in value.items() if one is not None or key == "content"}
    return value


def too_long(where: str) -> DataError:
    """Return the error for a document that is longer than memory should hold."""
    return DataError(f"{where} is longer than {LONGEST_DOCUMENT:,} characters: split it into several documents")


def _string(row: Row, column: str, where: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise DataError(f"{where}: {column!r} is {kind}: give a string, or drop the row")
    return text


def _messages(row: Row, column: str, where: str) -> list[dict[str, Any]]:
    found = row[column]
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        kind = "an empty list" if found == [] else "null" if found is None else f"of type {type(found).__name__}"
        kind = "a list of something else" if isinstance(found, list) and found else kind
        raise DataError(
            f'{where}: {column!r} is {kind}: give a list of {{"role": ..., "content": ...}}, or drop the row'
        )
    messages = [_named_usually(message) for message in found]
    if not all(isinstance(message.get("role"), str) for message in messages):
        raise DataError(f"{where}: a message of {column!r} has no role: give each one, such as user or assistant")
    return messages


def _named_usually(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message under the names that chat templates know."""
    if "role" in message:
        return message
    renamed = {_KEYS.get(key, key): value for key, value in message.items()}
    role = renamed.get("role")
    return renamed | {"role": _ROLES.get(role, role)} if isinstance(role, str) else renamed


def _chat(messages: list[dict[str, Any]], row: Row, where: str, render: Render) -> Document:
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is of type {shown(type(tools).__name__)}: give a list of descriptions")
    return Document(render(messages, tools, where), is_chat=True)


def _check_text(text: str, where: str) -> None:
    if len(text) > LONGEST_DOCUMENT:
        raise too_long(where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text has a lone surrogate, which is not a character: drop it") from error
