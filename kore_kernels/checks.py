"""Argument checks: each raises a ValueError or TypeError that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Triangle = Literal["lower", "upper"]


def is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)} ({meaning}), got {tuple(tensor.shape)}")


def same_device(op: str, name: str, tensor: Tensor, device: torch.device, other: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {other}'s device {device}, got {tensor.device}")


def square_matrix(op: str, C: object) -> None:
    """C is a matrix that can be updated in place: contiguous, square, float32 or float64, outside autograd."""
    is_tensor(op, "C", C)
    assert isinstance(C, Tensor)
    dtype(op, "C", C, (torch.float32, torch.float64))
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise ValueError(f"{op}: C must be a square matrix (d, d), got shape {tuple(C.shape)}")
    if not C.is_contiguous():
        raise ValueError(f"{op}: C must be contiguous, got strides {C.stride()} for shape {tuple(C.shape)}")
    if C.requires_grad:
        raise ValueError(f"{op}: C is written in place and must not require grad; pass C.detach()")


def triangle(op: str, value: object) -> None:
    if value not in ("lower", "upper"):
        raise ValueError(f"{op}: triangle must be 'lower' or 'upper', got {value!r}")


def probability(op: str, name: str, value: float) -> None:
    """A number from 0 to below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{op}: {name} must be at least 0 and below 1, got {value}")


def frozen(op: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} requires grad, but it will not be trained: gradients exist for x and B only; "
            f"call {name}.requires_grad_(False)"
        )


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_layer(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """weight (d_out, d_in) and bias (d_out,) are frozen and fit x (..., d_in)."""
    name, bias_name = names
    is_tensor(op, name, weight)
    dtype(op, name, weight, (x.dtype,))
    if weight.dim() != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {name} must have shape (d_out, d_in) and x shape (..., d_in), "
            f"got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    same_device(op, name, weight, x.device, "x")
    frozen(op, name, weight)
    if bias is not None:
        is_tensor(op, bias_name, bias)
        dtype(op, bias_name, bias, (x.dtype,))
        shape(op, bias_name, bias, (weight.shape[0],), f"{name} has {weight.shape[0]} rows")
        same_device(op, bias_name, bias, x.device, "x")
        frozen(op, bias_name, bias)


def adapter_factor(op: str, name: str, factor: Tensor, x: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """A low-rank factor has x's dtype or, beside a two-byte x, float32; and the dtype of the factor ``like``."""
    is_tensor(op, name, factor)
    if like is not None:
        other, first = like
        if factor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have {other}'s dtype {first.dtype}, got {factor.dtype}")
    else:
        wider = (torch.float32,) if x.dtype in (torch.bfloat16, torch.float16) else ()
        dtype(op, name, factor, (x.dtype, *wider))
    same_device(op, name, factor, x.device, "x")
    if factor.dim() != 2:
        raise ValueError(f"{op}: {name} must be a matrix, got shape {tuple(factor.shape)}")
