"""Batches of prompts, for covariance capture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kore.data.encoder import Encoder
from kore.data.types import Conversation
from kore.errors import DataError

if TYPE_CHECKING:
    import torch


class PromptBatches:
    """Re-iterable batches of the conversations' prompts (with images, without the last answer), in order."""

    def __init__(self, conversations: Sequence[Conversation], encoder: Encoder, batch_size: int) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size: expected at least 1, got {batch_size}")
        self._conversations, self._encoder, self._batch_size = conversations, encoder, batch_size

    def __len__(self) -> int:
        return -(-len(self._conversations) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self._conversations), self._batch_size):
            chosen = self._conversations[start : start + self._batch_size]
            yield self._encoder.collate([self._encoder.encode(item, part="prompt") for item in chosen])


def prompt_batches(conversations: Sequence[Conversation], encoder: Encoder, batch_size: int) -> PromptBatches:
    """Batches of dictionaries for ``model(**batch)``: the paper's calibration input (prompt and image tokens,
    no answers)."""
    return PromptBatches(conversations, encoder, batch_size)
