"""Finds what the assistant says in a chat that a chat template rendered.

Some templates mark it themselves, by ``{% generation %}``. For others, the text of the whole chat is compared with the
text up to each message. A span has the characters from its start to before its end.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orchestrator.data.blocks import DataError
from orchestrator.data.rows import check_text
from orchestrator.data.tokenizer import naming_template_failure, render_chat

Message = dict[str, Any]
Span = tuple[int, int]
ASSISTANT = "assistant"
_MARKS_ANSWERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatReader:
    """Renders chats with a tokenizer's template, and finds the assistant's turns in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._characters = _character_tokenizer()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Some tokenizers name "" as their padding.
        special = (special | set(tokenizer.all_special_tokens)) - {""}
        # Of two tokens that a text goes on with, the longer one stands there.
        self._special = tuple(sorted(special, key=len, reverse=True))

    def read(self, messages: list[Message], tools: list[Any] | None, given: int, where: str) -> tuple[str, list[Span]]:
        """Return the text of a chat, and the spans of the assistant's turns with the tokens that end them.

        Args:
            messages: The messages, of which the assistant's is the last.
            tools: Descriptions of the tools that the assistant may call.
            given: How many messages the chat begins with in which no turn is looked for.
            where: The place of the chat, which begins every error.

        Raises:
            DataError: The template does not take the messages, or does not show where the turns are.
        """
        text = render_chat(self._tokenizer, messages, tools, where)
        check_text(text, where)
        with naming_template_failure(self._tokenizer, where):
            template = self._tokenizer.get_chat_template(tools=tools)
        if _MARKS_ANSWERS.search(template):
            begin = _common(text, render_chat(self._tokenizer, messages[:given], tools, where)) if given else 0
            spans = [span for span in self._marked(template, messages, tools, where) if span[0] >= begin]
        else:
            spans = list(self._compared(text, messages, tools, given, where))
        if not spans:
            raise DataError(
                f"{where}: the chat template in {self._tokenizer.name_or_path} shows nothing of what the assistant "
                f"says: fix the template, or drop the row"
            )
        return text, [self._to_end_of_turn(text, span, spans[-1][1]) for span in spans]

    def _marked(self, template: str, messages: list[Message], tools: list[Any] | None, where: str) -> Iterator[Span]:
        """Yield the spans that the template marks.

        A tokenizer's own mask can miss them: it looks for the tokens of their first and last characters, and many
        tokenizers have none for a blank. So each character is a token here.
        """
        special: dict[str, Any] = self._tokenizer.special_tokens_map
        with naming_template_failure(self._tokenizer, where):
            encoded: Any = self._characters.apply_chat_template(
                messages, tools=tools, chat_template=template, return_assistant_tokens_mask=True, **special
            )
        steps = np.diff(np.array([0, *encoded["assistant_masks"], 0], dtype=np.int8))
        yield from zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True)

    def _compared(
        self, text: str, messages: list[Message], tools: list[Any] | None, given: int, where: str
    ) -> Iterator[Span]:
        """Yield the spans by which the text grows with each of the assistant's messages."""
        for number in range(given, len(messages)):
            if not answers(messages[number]):
                continue
            before, asked = (
                render_chat(self._tokenizer, messages[:number], tools, where, asks=asks) for asks in (False, True)
            )
            after = render_chat(self._tokenizer, messages[: number + 1], tools, where)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{where}: the chat template in {self._tokenizer.name_or_path} renders message {number} or one "
                    f"before it differently when others follow, so the assistant's tokens cannot be told: mark them "
                    f"in the template by {{% generation %}}, or drop the row"
                )
            if (start := _common(asked, after)) < len(after):
                yield start, len(after)

    def _to_end_of_turn(self, text: str, span: Span, last: int) -> Span:
        """Return a span that ends with the token that ends the turn.

        Blanks that the template puts after that token are left out: whoever generates stops before them. A token that
        the template marks as no part of the turn is taken in, if the chat's last turn, which ends at `last`, has it.
        """
        start, end = span
        said = text[start:end].rstrip()
        if said.endswith(self._special):
            return start, start + len(said)
        token = next((one for one in self._special if text.startswith(one, last)), "")
        return (start, end + len(token)) if text.startswith(token, end) else span


def answers(message: Message) -> bool:
    """Return whether the assistant says something in a message, or calls a tool."""
    content = message.get("content")
    says = bool(content.strip() if isinstance(content, str) else content)
    return message["role"] == ASSISTANT and (says or bool(message.get("tool_calls")))


def _character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are single characters."""
    characters = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters)


def _common(one: str, other: str) -> int:
    """Return with how many characters both texts begin."""
    least = min(len(one), len(other))
    if one[:least] == other[:least]:
        return least
    return next(place for place in range(least) if one[place] != other[place])
