"""The operations under torch.autocast: arguments as F.linear gets them, and nothing lowered inside."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def cast(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in the dtype that an enclosing autocast asks of a linear layer; itself without one or in float64."""
    if not torch.is_autocast_enabled(device.type) or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(device.type))


def disabled(device: torch.device) -> contextlib.AbstractContextManager:
    """Keeps an enclosing autocast from lowering the precision of the products inside an operation."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
