"""The algebra between W_res + B A and W0 + (B − B₀) A, in float64 and one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1024
_FLOAT32_ALGEBRA = 2.0**-18  # what the official code's float32 products and SVD leave, relative to W0


@dataclass(frozen=True)
class Recovered:
    """W0 − W_res = B₀A₀ + remainder.

    Attributes:
        A: A₀ (r, d_in) float64.
        B: B₀ (d_out, r) float64.
        remainder: ‖remainder‖_F as a multiple of what rounding alone can leave of W_res = W0 − B₀A₀ in the dtypes of
            the three: about 0.4 when they belong together, above 1 when they do not.
        share: ‖remainder‖_F / ‖W0 − W_res‖_F: about 1 when W0 is not the weight that was split.
    """

    A: Tensor
    B: Tensor
    remainder: float
    share: float


def pseudo_inverse(A: Tensor) -> Tensor:
    """A⁺ (d_in, r) float64 of A (r, d_in), also where rows of A are zero."""
    q, r = torch.linalg.qr(A.double().mT)
    return q @ torch.linalg.pinv(r.mT)


def initial_factor(weight: Tensor, residual: Tensor, A: Tensor) -> Recovered:
    """B₀ = (W0 − W_res) A⁺, the factor that was taken out of W0 (d_out, d_in) with the frozen A (r, d_in)."""
    inverse, A64 = pseudo_inverse(A), A.double()
    B = torch.cat([d @ inverse for d in _differences(weight, residual)])
    left = sum(
        float((d - b @ A64).square().sum()) for d, b in zip(_differences(weight, residual), B.split(_ROWS), strict=True)
    )
    return _recovered(A64, B, left, weight, residual, A)


def lowest_rank(weight: Tensor, residual: Tensor, A: Tensor) -> Recovered:
    """B₀A₀ of the rank of A nearest to W0 − W_res: what was taken out of W0 when A has been trained since."""
    rank = A.shape[0]
    difference = torch.cat(list(_differences(weight, residual)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(difference, q=min(rank + 16, *difference.shape), niter=6)
    u, s, v = u[:, :rank], s[:rank].sqrt(), v[:, :rank]
    B, A0 = u * s, s[:, None] * v.mT
    left = float((difference - B @ A0).square().sum())
    return _recovered(A0, B, left, weight, residual, A)


def split(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """W_res = W0 − B₀A in W0's dtype and B₀ = W0 A⁺ (d_out, r) float64: W0 P = B₀A as in the paper, P onto A's rows."""
    inverse, A64 = pseudo_inverse(A), A.double()
    residual, B = torch.empty_like(weight), []
    for w, out in zip(weight.split(_ROWS), residual.split(_ROWS), strict=True):
        w = w.double()
        B.append(w @ inverse)
        out.copy_(w - B[-1] @ A64)
    return residual, torch.cat(B)


def _differences(weight: Tensor, residual: Tensor) -> Iterator[Tensor]:
    """W0 − W_res in float64, some rows at a time."""
    for w, rest in zip(weight.split(_ROWS), residual.split(_ROWS), strict=True):
        yield w.double() - rest.double()


def _recovered(A0: Tensor, B: Tensor, left: float, weight: Tensor, residual: Tensor, A: Tensor) -> Recovered:
    unit = max(_FLOAT32_ALGEBRA, *(torch.finfo(tensor.dtype).eps / 2 for tensor in (weight, residual, A)))
    taken = sum(float(d.square().sum()) for d in _differences(weight, residual)) ** 0.5
    rounding = unit * (float(torch.linalg.vector_norm(residual, dtype=torch.float64)) + taken)
    return Recovered(A0, B, left**0.5 / max(rounding, 1e-300), left**0.5 / max(taken, 1e-300))
