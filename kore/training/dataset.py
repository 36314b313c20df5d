"""The training examples, checked before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kore.data.encoder import Encoder
from kore.data.types import BadRow, Conversation
from kore.errors import DataError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class TrainingSet:
    """Conversations that encode to at least one answer token. Images are decoded when an example is asked for.

    Attributes:
        conversations: The usable conversations.
        bad_rows: Those left out, and why.
        tokens: Tokens of all examples.
        answer_tokens: Those of them that carry loss.
        cut_examples: Examples cut to the encoder's ``max_length``.
        cut_tokens: Tokens cut off them.
    """

    def __init__(self, conversations: Sequence[Conversation], encoder: Encoder, on_bad_row: str = "fail") -> None:
        self._encoder = encoder
        self.conversations: list[Conversation] = []
        bad: list[BadRow] = []
        self.tokens = self.answer_tokens = self.cut_examples = self.cut_tokens = 0
        for conversation in conversations:
            try:
                measured = encoder.measure(conversation)
            except DataError as error:
                bad.append(BadRow(conversation.source, str(error)))
                continue
            self.conversations.append(conversation)
            self.tokens += len(measured.ids)
            self.answer_tokens += measured.answer_tokens
            self.cut_examples += measured.cut > 0
            self.cut_tokens += measured.cut
        self.bad_rows = tuple(bad)
        self._report(on_bad_row)

    def _report(self, on_bad_row: str) -> None:
        if self.bad_rows:
            more = f" (and {len(self.bad_rows) - 1} more)" if len(self.bad_rows) > 1 else ""
            if on_bad_row == "fail" or not self.conversations:
                raise DataError(f"{self.bad_rows[0].reason}{more}; on_bad_row='skip' leaves such examples out")
            logger.warning("%d examples left out; the first: %s", len(self.bad_rows), self.bad_rows[0].reason)
        if not self.conversations:
            raise DataError("there is no conversation to train on")
        if self.cut_examples:
            logger.warning(
                "%d of %d examples cut to max_length %s: %d tokens lost at their ends",
                self.cut_examples,
                len(self),
                self._encoder.max_length,
                self.cut_tokens,
            )
        logger.info("%d examples, %d tokens, %d of them answers", len(self), self.tokens, self.answer_tokens)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._encoder.encode(self.conversations[index])
