"""The algebra between W_res + B A and W0 + (B − B₀) A, in float64 and one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """

    A: Tensor
    B: Tensor
    remainder: float


def row_basis(A: Tensor) -> tuple[Tensor, Tensor]:
    """Q (d_in, r) with orthonormal columns and R (r, r), float64, of A (r, d_in): A = Rᵀ Qᵀ and A⁺ = Q (Rᵀ)⁺."""
    q, r = torch.linalg.qr(A.double().mT)
    return q, r


def initial_factor(weight: Tensor, residual: Tensor, A: Tensor) -> Recovered:
    """B₀ = (W0 − W_res) A⁺, the factor that was taken out of W0 (d_out, d_in) with the frozen A (r, d_in).

    B₀A is the part of W0 − W_res in the rows of A, so that the remainder is ‖W0 − W_res‖² − ‖B₀A‖² and is not formed.
    """
    q, r = row_basis(A)
    taken, projected = 0.0, []
    for difference in _differences(weight, residual):
        taken += float(difference.square().sum())
        projected.append(difference @ q)
    B = torch.cat(projected) @ torch.linalg.pinv(r.mT)
    left = taken - float((B @ r.mT).square().sum())
    return _recovered(A.double(), B, max(left, 0.0) ** 0.5, taken**0.5, weight, residual, A)


def lowest_rank(weight: Tensor, residual: Tensor, A: Tensor) -> Recovered:
    """B₀A₀ of the rank of A nearest to W0 − W_res: what was taken out of W0 when A has been trained since."""
    rank = A.shape[0]
    difference = torch.cat(list(_differences(weight, residual)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(difference, q=min(rank + 16, *difference.shape), niter=4)
    u, s, v = u[:, :rank], s[:rank].sqrt(), v[:, :rank]
    pad = rank - len(s)  # a rank above that of any matrix of this shape
    B, A0 = F.pad(u * s, (0, pad)), F.pad(s[:, None] * v.mT, (0, 0, 0, pad))
    left = float(torch.linalg.vector_norm(difference - B @ A0))
    return _recovered(A0, B, left, float(torch.linalg.vector_norm(difference)), weight, residual, A)


def split(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """W_res = W0 − B₀A in W0's dtype and B₀ = W0 A⁺ (d_out, r) float64: W0 P = B₀A as in the paper, P onto A's rows."""
    q, r = row_basis(A)
    inverse, A64 = q @ torch.linalg.pinv(r.mT), A.double()
    residual, B = torch.empty_like(weight), []
    for rows, out in zip(weight.split(_ROWS), residual.split(_ROWS), strict=True):
        wide = rows.double()
        B.append(wide @ inverse)
        out.copy_(wide - B[-1] @ A64)
    return residual, torch.cat(B)


def _differences(weight: Tensor, residual: Tensor) -> Iterator[Tensor]:
    """W0 − W_res in float64, some rows at a time."""
    for w, rest in zip(weight.split(_ROWS), residual.split(_ROWS), strict=True):
        yield w.double() - rest.double()


def _recovered(
    A0: Tensor, B: Tensor, left: float, taken: float, weight: Tensor, residual: Tensor, A: Tensor
) -> Recovered:
    unit = max(_FLOAT32_ALGEBRA, *(torch.finfo(tensor.dtype).eps / 2 for tensor in (weight, residual, A)))
    rounding = unit * (float(torch.linalg.vector_norm(residual, dtype=torch.float64)) + taken)
    return Recovered(A0, B, left / max(rounding, 1e-300))
