"""From a layer's input to the rows that are counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kore.capture.selection import Selection
from kore.errors import KoreError

# Rows of a sample from which an update of its own, in the dtype that they have, is cheaper than scaling them.
LONG_SAMPLE = 256


@dataclass(frozen=True)
class Rows:
    """Rows x (n, d), of which those count where mask (n,) is True, all if it is None; ``count`` of them.

    What they add to C is alpha · Σ xᵀx, with a 0-d alpha on the rows' device, or None for 1.
    """

    x: torch.Tensor
    mask: torch.Tensor | None
    count: int | torch.Tensor
    alpha: torch.Tensor | None = None


def counted_rows(
    x: torch.Tensor, selection: Selection, module: str, scale: bool = False, by_sample: bool = True
) -> list[Rows]:
    """What a layer's input x (..., d) adds to its covariance.

    Args:
        x: The input.
        selection: Which of its rows count, of the (batch, tokens) that they are.
        module: For messages.
        scale: Divide each sample by the absolute value of its maximum: the scaling of the official KORE code. The
            maximum is the signed one over the counted rows and all channels of a sample.
        by_sample: Give long samples unscaled, each with its alpha; else all rows are scaled, in float32.

    Raises:
        KoreError: Some rows do not count, but the rows of ``x`` are not the batch's (batch, tokens).
    """
    rows = x.reshape(-1, x.shape[-1])
    keep = index = None
    count: int | torch.Tensor = rows.shape[0]
    if selection.keep is not None:
        batch_tokens = tuple(selection.keep.shape)
        if tuple(x.shape[:-1]) not in (batch_tokens, (selection.keep.numel(),)):
            raise KoreError(
                f"{module}: not every one of the batch's {batch_tokens} tokens counts (padding, or tokens=...), but "
                f"the input {tuple(x.shape)} of this module has other rows; use batches without padding (batch size 1)"
            )
        count = selection.count
        keep, index = selection.on(x.device)
    if not scale or not rows.numel():
        return [Rows(rows, keep, count) if index is None else Rows(rows.index_select(0, index), None, count)]
    samples = _samples(x, selection.shape)
    tokens = rows.shape[0] // samples
    peaks, lengths = _peaks(rows, keep, samples), [tokens] * samples
    if index is not None:
        rows, keep, lengths = rows.index_select(0, index), None, selection.lengths()
    if not by_sample or rows.shape[0] < samples * LONG_SAMPLE:
        each = peaks.repeat_interleave(tokens)
        each = each if index is None else each.index_select(0, index)
        return [Rows(rows / each[:, None], keep, count)]
    masks = [None] * samples if keep is None else keep.split(lengths)
    alphas = peaks.square().reciprocal()
    return [
        Rows(part, mask, part.shape[0] if mask is None else mask.sum(), alpha)
        for part, mask, alpha in zip(rows.split(lengths), masks, alphas)
    ]


def _peaks(rows: torch.Tensor, keep: torch.Tensor | None, samples: int) -> torch.Tensor:
    """|max| of each sample over its kept rows (n, d), in float32; 1 where that is 0. The samples are equally long."""
    largest = rows.amax(dim=1).float()
    if keep is not None:
        largest = largest.masked_fill(~keep, -torch.inf)
    peaks = largest.reshape(samples, -1).amax(dim=1).abs()
    return torch.where(peaks == 0, 1.0, peaks)


def _samples(x: torch.Tensor, shape: tuple[int, int] | None) -> int:
    if shape is not None and x.numel() == shape[0] * shape[1] * x.shape[-1]:
        return shape[0]
    return x.shape[0] if x.dim() > 2 else 1
