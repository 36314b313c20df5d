"""What a forward pass keeps for the backward pass, and the most that a step holds at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kore.bench.timing import Step, synchronize


def saved_bytes(forward: Step) -> int:
    """Bytes of the storages that one call of ``forward`` saves for backward, each once.

    What two calls save alike is not counted: parameters and other tensors that are there anyway.
    """
    first, second = _saved(forward), _saved(forward)
    there = {tensor.untyped_storage().data_ptr() for tensor in first}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in second}
    return sum(size for place, size in sizes.items() if place not in there)


def _saved(forward: Step) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return kept


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The most that ``step`` takes from a GPU's allocator on top of what is held; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
