"""Accumulates C = Σ xᵀx of one layer input, through a token buffer and without host synchronisation."""

from __future__ import annotations

import torch

from kore.capture.rows import Rows
from kore.capture.storage import Storage
from kore.triangle import Triangle


class Accumulator:
    """One triangle of C (d, d) += Σ xᵀx over the kept rows that :meth:`add` receives.

    Rows are collected in a buffer and flushed ``buffer_rows`` at a time, whatever the batch size, because a
    covariance update of few rows is bound by the traffic of C. Rows with an alpha of their own are enough for an
    update of their own. Full buffers, and those, wait until :meth:`place` has made C.
    NaN and inf in a kept row propagate to the diagonal of C, which is therefore the device-side non-finite flag;
    :meth:`is_finite` reads it.

    Args:
        dim: d.
        device: Where the rows are.
        storage: Gives C its place.
        buffer_rows: Rows of the token buffer.
    """

    def __init__(self, dim: int, device: torch.device, storage: Storage, buffer_rows: int) -> None:
        self.dim, self.device, self.storage, self.buffer_rows = dim, device, storage, buffer_rows
        self.triangle: Triangle | None = None
        # On a GPU an update without a mask is the fastest, so rows that do not count are zeros in the buffer.
        self._zeroes = device.type == "cuda"
        self.visits = False
        self._waiting: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []
        self._buffer: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._fill = 0
        self._tokens: int | torch.Tensor = 0

    def place(self) -> Triangle:
        """Make C, if that is not done. On another device than the rows, it visits them for each update."""
        if self.triangle is None:
            self.triangle = self.storage.place(self.dim, self.device)
            self.visits = self.triangle.matrix.device != self.device
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                self._update(*each)
        return self.triangle

    def add(self, rows: Rows) -> None:
        """Add what these rows give. They may change afterwards."""
        x = rows.x.to(self.device)
        mask, alpha = (None if each is None else each.to(self.device) for each in (rows.mask, rows.alpha))
        self._tokens = self._tokens + rows.count
        if alpha is None:
            self._collect(x, mask)
        elif self.triangle is not None:
            self._update(x, mask, alpha)
        else:
            self._waiting.append((x.clone(), mask, alpha))

    def _collect(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        if self._buffer is not None and self._buffer.dtype != x.dtype:
            self.flush()
            self._buffer = self._mask = None
        start = 0
        while start < x.shape[0]:
            stop = min(x.shape[0], start + self.buffer_rows - self._fill)
            part, part_mask = x[start:stop], None if mask is None else mask[start:stop]
            if stop - start == self.buffer_rows and self.triangle is not None:
                self._update(part, part_mask)
            else:
                self._push(part, part_mask)
            start = stop

    def _push(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        if self._buffer is None:
            self._buffer = x.new_empty(self.buffer_rows, self.dim)
        start, stop = self._fill, self._fill + x.shape[0]
        rows = self._buffer[start:stop]
        if mask is not None and self._zeroes:
            torch.where(mask[:, None], x, x.new_zeros(()), out=rows)
            mask = None
        else:
            rows.copy_(x)
        if mask is not None and self._mask is None:
            self._mask = torch.ones(self.buffer_rows, dtype=torch.bool, device=x.device)
        if self._mask is not None:
            self._mask[start:stop] = True if mask is None else mask
        self._fill = stop
        if stop == self.buffer_rows:
            self.flush()

    def flush(self) -> None:
        """Move the buffered rows into C, or set them aside when C has no place yet."""
        if not self._fill:
            return
        assert self._buffer is not None
        x, mask = self._buffer[: self._fill], None if self._mask is None else self._mask[: self._fill]
        self._fill = 0
        if self.triangle is not None:
            self._update(x, mask)
        else:
            self._waiting.append((x, mask, None))
            self._buffer = self._mask = None

    def _update(self, x: torch.Tensor, mask: torch.Tensor | None, alpha: torch.Tensor | None = None) -> None:
        from kore_kernels import covariance_update_

        assert self.triangle is not None
        C, half, factor = self.triangle.matrix, self.triangle.half, 1.0 if alpha is None else alpha
        if not self.visits:
            covariance_update_(C, x, mask=mask, alpha=factor, triangle=half)
            return
        ordered = x.device.type == "cuda"  # by the stream
        visiting = torch.empty_like(C, device=x.device).copy_(C, non_blocking=ordered)
        covariance_update_(visiting, x, mask=mask, alpha=factor, triangle=half)
        C.copy_(visiting, non_blocking=ordered)

    def tokens(self) -> int:
        """Rows accumulated so far. Waits for the device where only that knows."""
        return int(self._tokens)

    def is_finite(self) -> bool:
        """Whether no NaN or inf has been flushed into C. Waits for the device, whereupon the host may read C."""
        if self.visits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.triangle is None or bool(torch.isfinite(self.triangle.matrix.diagonal()).all())

    def restore(self, matrix: torch.Tensor, tokens: int) -> None:
        """Continue from a flushed C, given as a symmetric matrix, and its token count."""
        self.place().assign(matrix)
        self._tokens = tokens
