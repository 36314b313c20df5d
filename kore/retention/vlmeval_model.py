"""KORE's models in VLMEvalKit, whose own classes take no Hugging Face LLaVA-1.5 directory and no adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kore.data.types import IMAGE_MARK, Message
from kore.errors import DataError
from kore.retention.answering import Answerer, Prompt


def kore_class() -> type:
    """The class ``Kore`` for ``vlmeval.vlm``; made here, since its base needs VLMEvalKit."""
    from vlmeval.vlm.base import BaseModel

    class Kore(BaseModel):  # type: ignore[misc]
        """See :class:`kore.retention.answering.Answerer`; ``model_path`` is its ``pretrained``."""

        INTERLEAVE = True

        def __init__(self, model_path: str, max_new_tokens: int = 512, **settings: Any) -> None:
            super().__init__()
            self.limit = max_new_tokens
            self.answerer = Answerer(model_path, **settings)

        def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            return self._answer([{"role": "user", "content": message}], dataset)

        def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            return self._answer(message, dataset)

        def _answer(self, turns: Sequence[Mapping[str, Any]], dataset: str | None) -> str:
            (found,) = self.answerer.answer([prompt_of(turns, dataset or "vlmevalkit", self.limit)])
            return found[0]

    return Kore


def prompt_of(turns: Sequence[Mapping[str, Any]], name: str, max_new_tokens: int) -> Prompt:
    """VLMEvalKit's turns, ``{role, content: [{type: text | image, value}]}``, as a prompt.

    Raises:
        DataError: A part is neither text nor image.
    """
    images: list[Any] = []
    messages = []
    for turn in turns:
        text = ""
        content = turn["content"]
        for part in [{"type": "text", "value": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                images.append(Path(part["value"]))
                text += f"{IMAGE_MARK}\n"
            elif part["type"] == "text":
                text += part["value"].replace(IMAGE_MARK, "")
            else:
                raise DataError(f"{name}: expected text and images, found {part['type']!r}")
        messages.append(Message(turn["role"], text))
    return Prompt(name, tuple(messages), lambda: images, max_new_tokens)
