"""Accumulates C = Σ xᵀx of one layer input, through a token buffer and without host synchronisation."""

from __future__ import annotations

import torch

from kore.errors import KoreError


class Accumulator:
    """Lower triangle of C (d, d) += Σ xᵀx over the kept rows of every ``x`` that :meth:`add` receives.

    Rows are collected in a buffer and flushed ``buffer_rows`` at a time, whatever the batch size, because a
    covariance update of few rows is bound by the traffic of C. C and the buffer are allocated on the device of
    the first ``x``. NaN and inf in a kept row propagate to the diagonal of C, which is therefore the
    device-side non-finite flag; :meth:`is_finite` reads it.
    """

    def __init__(self, dim: int, dtype: torch.dtype, buffer_rows: int) -> None:
        self.dim, self.dtype, self.buffer_rows = dim, dtype, buffer_rows
        self.matrix: torch.Tensor | None = None
        self._buffer: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._fill = 0
        self._masked = False
        self._rows = 0
        self._kept: torch.Tensor | None = None

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add the rows of ``x`` (n, d) where ``mask`` (n,) bool is True; all rows when it is None."""
        if self.matrix is None:
            self.matrix = torch.zeros(self.dim, self.dim, dtype=self.dtype, device=x.device)
        elif self.matrix.device != x.device:
            self.matrix = self.matrix.to(x.device)
        if self._buffer is not None and (self._buffer.dtype != x.dtype or self._buffer.device != x.device):
            self.flush()
            self._buffer = self._mask = None
        if mask is None:
            self._rows += x.shape[0]
        else:
            kept = mask.sum()
            self._kept = kept if self._kept is None else self._kept + kept
        start = 0
        while start < x.shape[0]:
            stop = min(x.shape[0], start + self.buffer_rows - self._fill)
            part, part_mask = x[start:stop], None if mask is None else mask[start:stop]
            if stop - start == self.buffer_rows:
                self._update(part, part_mask)
            else:
                self._push(part, part_mask)
            start = stop

    def _push(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        if self._buffer is None:
            self._buffer = torch.empty(self.buffer_rows, self.dim, dtype=x.dtype, device=x.device)
            self._mask = torch.empty(self.buffer_rows, dtype=torch.bool, device=x.device)
        assert self._mask is not None
        stop = self._fill + x.shape[0]
        self._buffer[self._fill : stop].copy_(x)
        if mask is None:
            self._mask[self._fill : stop].fill_(True)
        else:
            self._mask[self._fill : stop].copy_(mask)
            self._masked = True
        self._fill = stop
        if self._fill == self.buffer_rows:
            self.flush()

    def flush(self) -> None:
        """Move the buffered rows into C."""
        if self._fill:
            assert self._buffer is not None and self._mask is not None
            self._update(self._buffer[: self._fill], self._mask[: self._fill] if self._masked else None)
            self._fill, self._masked = 0, False

    def _update(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        from kore_kernels import covariance_update_

        assert self.matrix is not None
        covariance_update_(self.matrix, x, mask=mask)

    def tokens(self) -> int:
        """Rows accumulated so far. Synchronises with the device."""
        return self._rows + (0 if self._kept is None else int(self._kept))

    def is_finite(self) -> bool:
        """Whether no NaN or inf has been flushed into C. Synchronises with the device."""
        return self.matrix is None or bool(torch.isfinite(self.matrix.diagonal()).all())

    def restore(self, matrix: torch.Tensor, tokens: int) -> None:
        """Continue from a flushed C and its token count."""
        self.matrix = matrix.to(self.dtype)
        self._rows, self._kept, self._fill = tokens, None, 0


def rows(x: torch.Tensor, mask: torch.Tensor | None, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Flatten a layer's input (..., d) to rows (n, d) and line an attention mask (batch, tokens) up with them.

    Raises:
        KoreError: The input has padding in it but its rows are not the mask's (batch, tokens) rows.
    """
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat, None
    batch_tokens = tuple(mask.shape)
    if tuple(x.shape[:-1]) not in (batch_tokens, (mask.numel(),)):
        raise KoreError(
            f"{module}: the attention mask {batch_tokens} marks padding, but the input {tuple(x.shape)} of this "
            "module has other rows; use batches without padding (batch size 1)"
        )
    return flat, mask.reshape(-1)


def scale_samples(x: torch.Tensor, mask: torch.Tensor | None, samples: int) -> torch.Tensor:
    """x / |max(x)| for each sample, in float32: the scaling of the official KORE code.

    ``x`` (n, d) holds the rows of ``samples`` equally long samples. max is the signed maximum over the kept rows
    and all channels of a sample. The official code takes one sample at a time, without padding.
    """
    x = x.float()
    if x.numel() == 0:
        return x
    kept = x if mask is None else x.masked_fill(~mask[:, None], -torch.inf)
    peak = kept.reshape(samples, -1).amax(dim=1).abs()
    scale = torch.where(peak == 0, 1.0, peak).repeat_interleave(x.shape[0] // samples)
    return x / scale[:, None]
