"""lora_fa_linear by the compiled kernels for NVIDIA GPUs: every product by ``cuda.two_products``, one pass over each
result.

Two-byte numbers of one dtype, without dropout; anything else is passed on.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from kore_kernels import cuda, dispatch
from kore_kernels.cuda import readable, two_products
from kore_kernels.padding import padded


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if seed is not None or not cuda.suits(x, weight, bias, A, B):
        return _other(x).forward(x, weight, bias, A, B, scaling, dropout_p, seed)
    x = readable(x)
    h = project(x, readable(A).T)
    return two_products(x, readable(weight).T, bias, h, readable(B).T, scaling).contiguous(), h


def backward(
    g: Tensor,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    if seed is not None or not cuda.suits(g, weight, A, B, h):
        return _other(g).backward(g, weight, A, B, h, scaling, dropout_p, seed)
    g = readable(g)
    dx: Tensor | None = None
    if weight is not None and A is not None:
        gB = project(g, readable(B))
        dx = two_products(g, readable(weight), None, gB, readable(A), scaling).contiguous()
    return dx, None if h is None else gradient_of_B(g, h, B.shape[1], scaling)


def merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, want_h: bool
) -> tuple[Tensor, Tensor | None]:
    if not cuda.suits(x, weight, bias, A, B):
        return _other(x).merged_forward(x, weight, bias, A, B, scaling, want_h)
    x = readable(x)
    y = two_products(x, merged(weight, A, B, scaling).T, bias).contiguous()
    return y, project(x, readable(A).T) if want_h else None


def merged_backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    if not cuda.suits(g, weight, A, B, h):
        return _other(g).merged_backward(g, weight, A, B, h, scaling)
    g = readable(g)
    dB = None if h is None else gradient_of_B(g, h, B.shape[1], scaling)
    if weight is None or A is None:
        return None, dB
    return two_products(g, merged(weight, A, B, scaling)).contiguous(), dB


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + s B A, rounded once; its rows are readable."""
    return two_products(readable(B), readable(A), scaling=scaling, add=readable(weight))


def project(x: Tensor, basis: Tensor) -> Tensor:
    """x @ basis as (N, padded(rank)) whose other columns are zero."""
    return two_products(x, basis, columns=padded(basis.shape[1]))


def gradient_of_B(g: Tensor, h: Tensor, rank: int, scaling: float) -> Tensor:
    """scaling * gᵀ h without h's padding."""
    return two_products(g.T, readable(h)[:, :rank], scaling=scaling).contiguous()


def _other(x: Tensor) -> ModuleType:
    return dispatch.next_to_native("lora_fa_linear", x.device, x.dtype)
