"""Prompts for models of any family, by their own Hugging Face processor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from kore.data.tokens import IGNORE, Tokens
from kore.data.types import IMAGE_MARK, Conversation
from kore.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch

    from kore.data import Encoder


class ProcessorPrompts:
    """What :func:`kore.evaluation.evaluate` needs of an encoder, from a processor that KORE knows nothing of.

    The chat template gets the image and the text as parts of the user's turn, in the order of the question. Only
    prompts: a model of such a family can be asked, not trained.
    """

    max_length = None

    def __init__(self, processor: Any) -> None:
        """
        Args:
            processor: As ``AutoProcessor`` loads it, with a tokenizer and a chat template. Its tokenizer is set to pad
                on the left.
        """
        if getattr(processor, "chat_template", None) is None and getattr(processor.tokenizer, "chat_template", None):
            processor.chat_template = processor.tokenizer.chat_template
        if getattr(processor, "chat_template", None) is None:
            raise ModelError("the model's processor has no chat template; add chat_template.jinja beside its files")
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def measure(self, conversation: Conversation, *, part: str = "prompt") -> Tokens:
        """The token ids of the prompt; decodes its images."""
        ids = self.collate([self.encode(conversation)])["input_ids"][0].tolist()
        return Tokens(ids, [IGNORE] * len(ids), len(conversation.images))

    def encode(self, conversation: Conversation, *, part: str = "prompt") -> dict[str, Any]:
        """The rendered prompt and the decoded images.

        Raises:
            DataError: An image cannot be read; the message starts with the conversation's source.
        """
        from kore.fetch import open_image

        try:
            images = [open_image(path) for path in conversation.images]
        except DataError as error:
            raise DataError(f"{conversation.source or conversation.id}: {error}") from None
        messages = [{"role": message.role, "content": _parts(message.text)} for message in conversation.messages]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return {"text": text, "images": images}

    def collate(
        self, examples: Sequence[dict[str, Any]], padding_side: Literal["left"] = "left"
    ) -> dict[str, torch.Tensor]:
        """The processor's inputs of a batch, padded on the left.

        Raises:
            DataError: The processor refuses the images or the text.
        """
        images = [example["images"] for example in examples]
        given = {"images": images} if any(images) else {}
        texts = [example["text"] for example in examples]
        bos = self.tokenizer.bos_token
        special = not (bos and all(text.startswith(bos) for text in texts))
        try:
            batch = self.processor(text=texts, **given, padding=True, return_tensors="pt", add_special_tokens=special)
        except (ValueError, TypeError, IndexError) as error:
            raise DataError(f"the model's processor refuses a prompt ({error})") from error
        return {name: value for name, value in batch.items() if hasattr(value, "to")}

    def decode(self, ids: Any) -> str:
        """The text of token ids, special tokens left out, without surrounding space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def load_prompts(path: str | os.PathLike[str]) -> Encoder | ProcessorPrompts:
    """The encoder of a family that KORE trains, else the model's own processor.

    Raises:
        ModelError: Neither can be loaded.
    """
    from kore.data import Encoder

    try:
        return Encoder.from_pretrained(path)
    except ModelError as error:
        import transformers

        try:
            processor = transformers.AutoProcessor.from_pretrained(os.fspath(path))
        except Exception:
            raise error from None
        if getattr(processor, "image_processor", None) is None:
            raise
        return ProcessorPrompts(processor)


def _parts(text: str) -> list[dict[str, str]]:
    """The text and the places of its images as parts of a turn."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts
