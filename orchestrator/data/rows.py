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


class RowForm(NamedTuple):
    """The columns that a row must have, and those that it may have; the first one names the form."""

    needed: tuple[str, ...]
    others: tuple[str, ...] = ()


def _from_text(row: Row, where: str, render: Render) -> Document:
    return Document(string_of(row, "text", where))


def _from_messages(row: Row, where: str, render: Render) -> Document:
    return _chat(messages_of(row, "messages", where), row, where, render)


def _from_conversations(row: Row, where: str, render: Render) -> Document:
    return _chat(messages_of(row, "conversations", where), row, where, render)


def _from_instruction(row: Row, where: str, render: Render) -> Document:
    parts = []
    for column, heading in _PARTS:
        if column != "input" or row.get(column) is not None:
            text = string_of(row, column, where)
            parts += [f"### {heading}:\n{text}"] if text or column != "input" else []
    return Document("\n\n".join(parts))


def _from_prompt(row: Row, where: str, render: Render) -> Document:
    if isinstance(row["prompt"], list):
        both = [*messages_of(row, "prompt", where), *messages_of(row, "completion", where)]
        return _chat(both, row, where, render)
    return Document(string_of(row, "prompt", where) + string_of(row, "completion", where))


# The forms of rows that hold prompts and responses.
INSTRUCTIONS = (
    RowForm(("messages",), ("tools",)),
    RowForm(("conversations",), ("tools",)),
    RowForm(("instruction", "output"), ("input",)),
    RowForm(("prompt", "completion"), ("tools",)),
)
FORMS = (RowForm(("text",)), *INSTRUCTIONS)
COLUMNS = tuple(dict.fromkeys(name for form in FORMS for name in (*form.needed, *form.others)))
_MAKERS: dict[str, Callable[[Row, str, Render], Document]] = {
    "text": _from_text,
    "messages": _from_messages,
    "conversations": _from_conversations,
    "instruction": _from_instruction,
    "prompt": _from_prompt,
}


def form_of_row(names: Iterable[str], forms: Iterable[RowForm] = FORMS) -> RowForm | None:
    """Return the first form whose columns are among the names; None if no form fits."""
    names = set(names)
    return next((form for form in forms if names.issuperset(form.needed)), None)


def columns_to_read(names: Iterable[str], forms: Iterable[RowForm] = FORMS) -> list[str]:
    """Return those of a table's columns that make its documents; none if no form fits."""
    names = set(names)
    form = form_of_row(names, forms)
    return [name for name in (*form.needed, *form.others) if name in names] if form else []


def document_of(row: Row, where: str, render: Render) -> Document:
    """Return the document of a row.

    Args:
        row: The values by column.
        where: The row's place, which begins every error.
        render: Applies the tokenizer's chat template.

    Raises:
        DataError: The row has none of these columns, or they do not hold text or messages.
    """
    form = form_of_row(row)
    if form is None:
        raise DataError(f"{where}: no 'text' among the columns ({list_names(row)}): {REMEDY}")
    document = _MAKERS[form.needed[0]](row, where, render)
    check_text(document.text, where)
    return document


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


def string_of(row: Row, column: str, where: str) -> str:
    """Return the string in a column of a row.

    Raises:
        DataError: There is something else.
    """
    text = row[column]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise DataError(f"{where}: {column!r} is {kind}: give a string, or drop the row")
    return text


def messages_of(row: Row, column: str, where: str) -> list[dict[str, Any]]:
    """Return the messages in a column of a row, under the names that chat templates know.

    Raises:
        DataError: There are none, or there is something else.
    """
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


def tools_of(row: Row, where: str) -> list[Any] | None:
    """Return the descriptions of tools in a row; None if there are none.

    Raises:
        DataError: There is something else.
    """
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is of type {shown(type(tools).__name__)}: give a list of descriptions")
    return tools


def _chat(messages: list[dict[str, Any]], row: Row, where: str, render: Render) -> Document:
    return Document(render(messages, tools_of(row, where), where), is_chat=True)


def check_text(text: str, where: str) -> None:
    """Raise DataError if a text is too long, or holds what is no character."""
    if len(text) > LONGEST_DOCUMENT:
        raise too_long(where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text has a lone surrogate, which is not a character: drop it") from error
