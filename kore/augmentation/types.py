"""What the parts of the augmentation hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel

Category = Literal["news", "entity"]
Task = Literal["dialogue", "recognition", "caption", "vqa"]
TASKS: tuple[Task, ...] = ("dialogue", "recognition", "caption", "vqa")


@dataclass(frozen=True)
class KnowledgeItem:
    """One piece of knowledge.

    Attributes:
        id: Unique in its file, and a name that a folder can have.
        category: ``"news"`` for something that happened, ``"entity"`` for something that exists.
        type: What it is in one or two words, such as ``"politics"`` or ``"film"``.
        title: The title of the news, or the name of the entity.
        text: What is to be known, in sentences.
        image: The original image, or None.
        facts: What the text says as attribute and value, for generation by rules; may be empty.
        source: File and line it was read from.
    """

    id: str
    category: Category
    type: str
    title: str
    text: str
    image: Path | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Request:
    """One question to a language model.

    Attributes:
        task: What it is for.
        item: The knowledge it is about.
        messages: Chat messages, ``{"role", "content"}``, in order.
        schema: What the answer has to be, as JSON.
        max_tokens: The longest answer.
        attempt: 0, then 1 for each repetition after an answer that was not accepted.
        seed: Of sampling.
        form: Says in words which JSON is wanted, for a service that takes a schema no other way.
    """

    task: Task
    item: KnowledgeItem
    messages: tuple[Mapping[str, str], ...]
    schema: type[BaseModel]
    max_tokens: int
    attempt: int = 0
    seed: int = 0
    form: str = ""

    def with_form(self) -> list[dict[str, str]]:
        """The messages, with ``form`` at the end of the last."""
        result = [dict(message) for message in self.messages]
        result[-1]["content"] += f"\n\n{self.form}"
        return result


@dataclass(frozen=True)
class Reply:
    """The answer to a request: text that should be JSON, and what it took.

    ``problem`` says why it is none, where the service knows: refused, held back by a filter, cut off.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""


class Generator(Protocol):
    """A source of answers. Several threads call it at once."""

    def identity(self) -> Mapping[str, Any]:
        """What its answers depend on, JSON-serialisable, without secrets: part of the cache's keys."""

    def generate(self, request: Request) -> Reply:
        """Answer once, without repetition or cache.

        Raises:
            Unavailable: A passing failure, such as a time-out or an overloaded server.
            KoreError: A lasting one, such as a wrong key.
        """


@dataclass(frozen=True)
class Candidate:
    """An image that a search found and nobody has opened yet.

    Attributes:
        url: Where to download it, or None for a local file.
        path: The local file, or None.
        page: The page that shows it and says its licence, or the local file's place in its data set.
        title: What it is called there.
        licence: Its licence as its source names it, ``"unknown"`` where it does not.
        author: Whom the licence names.
    """

    url: str | None = None
    path: Path | None = None
    page: str = ""
    title: str = ""
    licence: str = "unknown"
    author: str = ""


@dataclass(frozen=True)
class StoredImage:
    """An image in the store: ``<sha256>.<jpg or png>`` without metadata, and where it came from."""

    sha256: str
    path: Path
    width: int
    height: int
    candidate: Candidate


class ImageSource(Protocol):
    """A search for images. Several threads call it at once."""

    def identity(self) -> Mapping[str, Any]:
        """What its results depend on, JSON-serialisable, without secrets: part of the cache's keys."""

    def search(self, query: str, count: int) -> Sequence[Candidate]:
        """The best matches first, at most ``count``, maybe none.

        Raises:
            Unavailable: A passing failure.
            KoreError: A lasting one.
        """


@dataclass(frozen=True)
class Sample:
    """One conversation of the result.

    Attributes:
        id: Item and task, and a number where an item has several.
        item: The item's id.
        task: What it trains.
        turns: (question, answer) pairs, without image marks.
        image: The image of the first question, or None.
        similarity: Cosine similarity of ``image`` to the item's original image, where it was measured.
    """

    id: str
    item: str
    task: Task
    turns: tuple[tuple[str, str], ...]
    image: StoredImage | None = None
    similarity: float | None = None


@dataclass(frozen=True)
class Failure:
    """Something that could not be made, and why; the rest of the item may be there.

    ``passing`` where a service did not answer, so that another run may make it.
    """

    item: str
    task: Task
    reason: str
    passing: bool = False


@dataclass(frozen=True)
class ItemResult:
    """All that came of one item."""

    item: KnowledgeItem
    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...]
