"""Which token rows of a batch are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kore.errors import KoreError
from kore.models import base_model

TOKENS = ("all", "prompt", "image", "text", "answer")
IGNORE = -100
_IMAGE_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Selection:
    """The counted rows of one batch.

    Attributes:
        shape: (batch, tokens), or None where the batch does not say.
        keep: (batch, tokens) bool, True for a counted row; None when all are counted.
        index: The positions of the counted rows among batch·tokens, where they are known without asking the device.
        count: How many there are; a 0-d tensor when only the device knows. Without ``keep``, 0 and unused.
    """

    shape: tuple[int, int] | None = None
    keep: torch.Tensor | None = None
    index: torch.Tensor | None = None
    count: int | torch.Tensor = 0
    _moved: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """Counted rows of each sample, where ``index`` is known."""
        assert self.keep is not None and self.index is not None
        return self.keep.sum(dim=1).tolist()

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``keep`` and ``index``, flat, on a device; moved once per batch and device."""
        moved = self._moved.get(device)
        if moved is None:
            assert self.keep is not None
            index = None if self.index is None else send(self.index, device)
            moved = self._moved[device] = send(self.keep, device).reshape(-1), index
        return moved


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on a device, without waiting where that is safe: the host must not read what is still on its way."""
    return x.to(device, non_blocking=device.type != "cpu")


class Selector:
    """Reads from each batch which rows of the language model count. Padding never does.

    ``"prompt"`` are the rows whose label is -100 and ``"answer"`` the others; ``"image"`` are the rows whose input
    id is the model's image or video placeholder and ``"text"`` the others. A selection is computed on the CPU when
    the batch is there; then only the counted rows travel through the token buffer. When the batch is on another
    device it is computed there as a mask, and nothing waits for it.

    Raises:
        KoreError: There is no such selection, or the model's configuration names no image token.
    """

    def __init__(self, tokens: str, model: nn.Module) -> None:
        if tokens not in TOKENS:
            raise KoreError(f"tokens: expected one of {', '.join(TOKENS)}, got {tokens!r}")
        config = getattr(base_model(model), "config", None)
        found = {getattr(config, name, None) for name in _IMAGE_IDS}
        self.tokens = tokens
        self.image_ids = sorted(value for value in found if isinstance(value, int))
        if tokens == "image" and not self.image_ids:
            name = type(base_model(model)).__name__
            raise KoreError(f"tokens='image': the configuration of {name} names no image token")

    def select(self, batch: Mapping[str, Any], number: int) -> Selection:
        """The selection of a batch; ``number`` is for messages."""
        padding, ids = batch.get("attention_mask"), batch.get("input_ids", batch.get("inputs_embeds"))
        if padding is not None and padding.dim() != 2:
            raise KoreError(f"batch {number}: expected an attention_mask (batch, tokens), got {tuple(padding.shape)}")
        parts = [] if padding is None else [padding != 0]
        if self.tokens in ("prompt", "answer"):
            answers = self._needed(batch, "labels", number) != IGNORE
            parts.append(answers if self.tokens == "answer" else ~answers)
        elif self.tokens in ("image", "text") and self.image_ids:
            input_ids = self._needed(batch, "input_ids", number)
            images = torch.stack([input_ids == one for one in self.image_ids]).any(dim=0)
            parts.append(images if self.tokens == "image" else ~images)
        if not parts:
            known = isinstance(ids, torch.Tensor) and ids.dim() > 1
            return Selection((ids.shape[0], ids.shape[1]) if known else None)
        device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
        keep = parts[0].to(device)
        for part in parts[1:]:
            if part.shape != keep.shape:
                raise KoreError(
                    f"batch {number}: attention_mask, input_ids and labels have different shapes, for example "
                    f"{tuple(keep.shape)} and {tuple(part.shape)}"
                )
            keep = keep & part.to(device)
        shape = (keep.shape[0], keep.shape[1])
        if device.type != "cpu":
            return Selection(shape, keep, None, keep.sum())
        index = keep.reshape(-1).nonzero().squeeze(1)
        return Selection(shape) if len(index) == keep.numel() else Selection(shape, keep, index, len(index))

    def _needed(self, batch: Mapping[str, Any], key: str, number: int) -> torch.Tensor:
        value = batch.get(key)
        if not isinstance(value, torch.Tensor) or value.dim() != 2:
            raise KoreError(f"batch {number}: tokens={self.tokens!r} needs {key} (batch, tokens) in every batch")
        return value
