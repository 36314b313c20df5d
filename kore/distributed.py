"""Processes that work together: what they tell each other, and sums that come out alike on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from kore.errors import KoreError
from kore.triangle import Triangle


class Processes:
    """The processes of a torch.distributed group, or this one alone.

    Args:
        group: A process group; None for the default group where torch.distributed is initialised; False for this
            process alone.

    Attributes:
        rank: The number of this process.
        count: How many there are.
    """

    def __init__(self, group: dist.ProcessGroup | bool | None = None) -> None:
        together = group is not False and dist.is_available() and dist.is_initialized()
        if not together and group not in (None, False):
            raise KoreError("distributed: expected an initialised torch.distributed; call init_process_group first")
        self._group = None if isinstance(group, bool) else group
        self.rank = dist.get_rank(self._group) if together else 0
        self.count = dist.get_world_size(self._group) if together else 1

    def share(self, value: Any) -> list[Any]:
        """The values that the processes give, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def fail_together(self, what: str = "the capture") -> Iterator[None]:
        """When the block fails in one process, raise in all, so that none waits for another in vain."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = self.share(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise KoreError(f"process {rank} of {what} failed: {failure}")

    def add_up(self, triangle: Triangle) -> None:
        """Replace the triangle by the sum over the processes.

        Summed in float64, in blocks of bounded size, rounded once; the first process hands its bits to all.
        """
        if self.count == 1:
            return
        device, first = self._device(), self._global(0)
        for block, mine in triangle.blocks():
            total = block.to(device, torch.float64, copy=True, memory_format=torch.contiguous_format)
            dist.reduce(total, dst=first, group=self._group)
            rounded = total.to(block.dtype)
            dist.broadcast(rounded, src=first, group=self._group)
            block.copy_(rounded.to(block.device).where(mine, block))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors of all processes, in float64 on the CPU, the same bits in each."""
        if self.count == 1:
            return tensor.to("cpu", torch.float64)
        total = tensor.to(self._device(), torch.float64, copy=True, memory_format=torch.contiguous_format)
        dist.reduce(total, dst=self._global(0), group=self._group)
        dist.broadcast(total, src=self._global(0), group=self._group)
        return total.cpu()

    def hand_out(
        self, tensor: torch.Tensor | None, owner: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The CPU tensor (shape, dtype) of the process ``owner``, to the bit, on every process; others give None."""
        if self.count == 1:
            assert tensor is not None
            return tensor
        sent = torch.empty(shape, dtype=dtype) if tensor is None else tensor.contiguous()
        sent = sent.to(self._device())
        dist.broadcast(sent, src=self._global(owner), group=self._group)
        return sent.cpu()

    def _device(self) -> torch.device:
        """Where tensors are when they are exchanged."""
        nccl = "nccl" in dist.get_backend(self._group)
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)
