"""Batches of conversations, for covariance capture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kore.data.encoder import Encoder, Part
from kore.data.types import Conversation
from kore.errors import DataError

if TYPE_CHECKING:
    import torch


class ConversationBatches:
    """Re-iterable batches of conversations with their images, in order."""

    def __init__(self, conversations: Sequence[Conversation], encoder: Encoder, batch_size: int, part: Part) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size: expected at least 1, got {batch_size}")
        self._conversations, self._encoder, self._batch_size, self._part = conversations, encoder, batch_size, part

    def __len__(self) -> int:
        return -(-len(self._conversations) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self._conversations), self._batch_size):
            chosen = self._conversations[start : start + self._batch_size]
            yield self._encoder.collate([self._encoder.encode(item, part=self._part) for item in chosen])


def prompt_batches(conversations: Sequence[Conversation], encoder: Encoder, batch_size: int) -> ConversationBatches:
    """Batches of dictionaries for ``model(**batch)``: the paper's calibration input (prompt and image tokens,
    no answers)."""
    return ConversationBatches(conversations, encoder, batch_size, "prompt")


def conversation_batches(
    conversations: Sequence[Conversation], encoder: Encoder, batch_size: int
) -> ConversationBatches:
    """Batches of dictionaries for ``model(**batch)`` with everything up to the last answer, and ``labels`` that mark
    the tokens of the answers."""
    return ConversationBatches(conversations, encoder, batch_size, "train")
