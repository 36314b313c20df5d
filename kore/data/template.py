"""Rendering a conversation with a chat template, and finding its answers in the rendered text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kore.data.types import IMAGE_MARK, Conversation, Message
from kore.errors import DataError

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n' }}"
    "{% elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Used where a model has no chat template: ``USER: question ASSISTANT: answer``, as LLaVA-1.5 was trained."""

_MARK = re.compile(rf"\n?{re.escape(IMAGE_MARK)}\n?")
_PROBE = "probe of the content format"


@dataclass(frozen=True)
class Answer:
    """Characters of one answer in the rendered text: what the model must produce starts at ``start``, the
    answer's own text ends at ``text_end`` and the turn, with any end-of-turn token, at ``end``."""

    start: int
    text_end: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation. ``tail`` is where its generation prompt starts (the end when it has none)."""

    text: str
    answers: tuple[Answer, ...]
    tail: int


class ChatTemplate:
    """A chat template together with the content format it understands (lists of parts, or plain text)."""

    def __init__(self, tokenizer: Any, template: str | None, image_token: str | None) -> None:
        self.template = DEFAULT_TEMPLATE if template is None else template
        self._tokenizer = tokenizer
        self._image_token = image_token
        self._parts = self._understands_parts()

    def _understands_parts(self) -> bool:
        try:
            text = self._apply([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}], False)
        except Exception:
            return False
        return _PROBE in text and "'type'" not in text

    def _apply(self, messages: list[dict[str, Any]], generation: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        )

    def _content(self, text: str) -> Any:
        """Template content of one message; a line break next to an image mark belongs to the mark."""
        pieces = _MARK.split(text)
        if not self._parts:
            return f"{self._image_token}\n".join(pieces) if len(pieces) > 1 else text
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            if number:
                parts.append({"type": "image"})
            if piece or len(pieces) == 1:
                parts.append({"type": "text", "text": piece})
        return parts

    def _text(self, messages: Sequence[Message], generation: bool = False) -> str:
        turns = [{"role": message.role, "content": self._content(_spoken(message))} for message in messages]
        try:
            return self._apply(turns, generation)
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"the chat template refuses the conversation ({first_line})") from error

    def prompt(self, conversation: Conversation) -> Rendered:
        """The conversation up to its last answer, ready for the model to answer."""
        messages = conversation.messages
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        text = self._text(messages, generation=True)
        return Rendered(text, (), _common(self._text(messages), text))

    def train(self, conversation: Conversation) -> Rendered:
        """The conversation up to and with its last answer, every answer located.

        Raises:
            DataError: There is no answer, or the template rewrites earlier turns so that one cannot be located.
        """
        messages = conversation.messages
        if messages[-1].role == "user":
            messages = messages[:-1]
        if not any(message.role == "assistant" for message in messages):
            raise DataError("the conversation has no answer")
        text = self._text(messages)
        answers = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start = _common(self._text(messages[:index], generation=True), text)
            end = _common(self._text(messages[: index + 1]), text)
            place = text.find(_spoken(message), start, end)
            if place < 0:
                raise DataError(f"turn {index + 1}: the chat template changes the answer; it cannot be located")
            answers.append(Answer(start, place + len(_spoken(message)), end))
        return Rendered(text, tuple(answers), len(text))


def _spoken(message: Message) -> str:
    """The text of a turn; space around an answer is none of its content."""
    return message.text.strip() if message.role == "assistant" else message.text


def _common(first: str, second: str) -> int:
    """Length of the longest common prefix."""
    if second.startswith(first):
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
