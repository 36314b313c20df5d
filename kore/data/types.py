"""What the data files are read into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

IMAGE_MARK = "<image>"

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn. ``<image>`` in ``text`` marks the place of an image."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """A conversation and the images its ``<image>`` marks stand for, in order."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    source: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class Conversations(list[Conversation]):
    """A list of conversations; ``bad_rows`` are the rows that were left out."""

    def __init__(self, conversations: Iterable[Conversation] = (), bad_rows: Iterable[BadRow] = ()) -> None:
        super().__init__(conversations)
        self.bad_rows = tuple(bad_rows)

    @overload  # type: ignore[override]
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Conversations: ...
    def __getitem__(self, index: int | slice) -> Conversation | Conversations:
        if isinstance(index, slice):
            return Conversations(list.__getitem__(self, index), self.bad_rows)
        return list.__getitem__(self, index)


@dataclass(frozen=True)
class Question:
    """One evaluation question with its reference answer; ``history`` are rounds before it, asked and answered."""

    question_id: str
    image: Path | None
    text: str
    answer: str
    type: str
    source: str = ""
    history: tuple[tuple[str, str], ...] = ()

    def conversation(self) -> Conversation:
        """The question as a conversation without its answer; the image comes first unless marked elsewhere."""
        texts = [text for asked in self.history for text in asked] + [self.text]
        if self.image is not None and not any(IMAGE_MARK in text for text in texts):
            texts[0] = f"{IMAGE_MARK}\n{texts[0]}"
        images = () if self.image is None else (self.image,)
        messages = tuple(Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
        return Conversation(self.question_id, images, messages, self.source)
