"""From a layer's input to the rows that are counted."""

from __future__ import annotations

import torch

from kore.capture.selection import Selection
from kore.errors import KoreError

Counted = tuple[torch.Tensor, "torch.Tensor | None", "int | torch.Tensor"]


def counted_rows(x: torch.Tensor, selection: Selection, module: str, scale: bool = False) -> Counted:
    """Rows (n, d) of a layer's input x (..., d), a mask (n,) of those that count or None for all, and their number.

    Args:
        x: The input.
        selection: Which of its rows count, of the (batch, tokens) that they are.
        module: For messages.
        scale: Divide each sample by the absolute value of its maximum, see :func:`scale_samples`.

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
    if scale:
        rows = scale_samples(rows, keep, _samples(x, selection.shape))
    if index is not None:
        return rows.index_select(0, index), None, count
    return rows, keep, count


def scale_samples(x: torch.Tensor, keep: torch.Tensor | None, samples: int) -> torch.Tensor:
    """x / |max(x)| for each sample, in float32: the scaling of the official KORE code.

    ``x`` (n, d) holds the rows of ``samples`` equally long samples. max is the signed maximum over the kept rows
    and all channels of a sample. The official code takes one sample at a time, without padding.
    """
    x = x.float()
    if x.numel() == 0:
        return x
    kept = x if keep is None else x.masked_fill(~keep[:, None], -torch.inf)
    peak = kept.reshape(samples, -1).amax(dim=1).abs()
    scale = torch.where(peak == 0, 1.0, peak).repeat_interleave(x.shape[0] // samples)
    return x / scale[:, None]


def _samples(x: torch.Tensor, shape: tuple[int, int] | None) -> int:
    if shape is not None and x.numel() == shape[0] * shape[1] * x.shape[-1]:
        return shape[0]
    return x.shape[0] if x.dim() > 2 else 1
