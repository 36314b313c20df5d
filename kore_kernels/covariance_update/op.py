"""covariance_update_: public function, argument checks and torch.library registration."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from kore_kernels import autocast, checks, dispatch

_OP = "covariance_update_"
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS = (*_INPUT_DTYPES, torch.float64)


def covariance_update_(
    C: Tensor,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    triangle: checks.Triangle = "lower",
) -> Tensor:
    """One triangle of ``C += alpha * Σ_i w_i x_iᵀ x_i``, in place: the uncentred covariance of the rows of ``x``.

    This is the accumulation step of the covariance of KORE (arXiv 2510.19316, the matrix ``X Xᵀ`` of its constraint).
    The other half is neither read nor written; ``symmetrize_`` fills it when the sum is complete. Because of that, two
    matrices fit into one contiguous ``buffer`` (d + 1, d): one in the lower triangle of ``buffer[1:]``, one in the
    upper triangle of ``buffer[:d]``.

    Args:
        C: (d, d), float32 or float64, contiguous. The only tensor that is written.
        x: (..., d), float32, bfloat16 or float16, any strides; float64 too where C is float64. Sums are accumulated
            in C's dtype.
        mask: (...) bool, True keeps the row. What an excluded row holds, NaN and inf included, has no influence.
        weight: (...) row weights, any floating dtype and any sign.
        alpha: a number, or a 0-d floating tensor on x's device, which is read there, without host synchronisation.
        triangle: "lower" updates C[i, j] for i >= j, "upper" for i <= j.

    Returns:
        C.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. C is unchanged then.

    NaN and inf in a kept row propagate into C. No rows: C is unchanged. The native and Triton backends take
    at most 12 MiB beside a small multiple of x, whatever d is (the compiled CUDA kernels 128 KiB for each of the GPU's
    multiprocessors). No gradient flows through this function.
    """
    _check(C, x, mask, weight, alpha)
    checks.triangle(_OP, triangle)
    weight = None if weight is None else weight.detach()
    if isinstance(alpha, Tensor):
        torch.ops.kore.covariance_update_(C, x.detach(), mask, weight, 1.0, alpha.detach(), triangle)
    else:
        torch.ops.kore.covariance_update_(C, x.detach(), mask, weight, float(alpha), None, triangle)
    return C


def _check(C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor) -> None:
    checks.square_matrix(_OP, C)
    checks.is_tensor(_OP, "x", x)
    checks.dtype(_OP, "x", x, _FLOATS if C.dtype == torch.float64 else _INPUT_DTYPES)
    if x.dim() == 0 or x.shape[-1] != C.shape[0]:
        raise ValueError(f"{_OP}: x must have shape (..., {C.shape[0]}) to match C, got {tuple(x.shape)}")
    checks.same_device(_OP, "x", x, C.device, "C")
    for name, rows, allowed in (("mask", mask, (torch.bool,)), ("weight", weight, _FLOATS)):
        if rows is not None:
            checks.is_tensor(_OP, name, rows)
            checks.dtype(_OP, name, rows, allowed)
            checks.shape(_OP, name, rows, x.shape[:-1], "one value per row of x")
            checks.same_device(_OP, name, rows, x.device, "x")
    if isinstance(alpha, Tensor):
        checks.dtype(_OP, "alpha", alpha, _FLOATS)
        checks.shape(_OP, "alpha", alpha, (), "a 0-d tensor")
        checks.same_device(_OP, "alpha", alpha, x.device, "x")
    elif not isinstance(alpha, Real):
        raise TypeError(f"{_OP}: alpha must be a number or a 0-d tensor, got {type(alpha).__name__}")


@torch.library.custom_op(
    "kore::covariance_update_",
    mutates_args=("C",),
    schema="(Tensor(a!) C, Tensor x, Tensor? mask, Tensor? weight, float alpha, Tensor? alpha_tensor,"
    " str triangle) -> ()",
)
def _covariance_update(
    C: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    alpha: float,
    alpha_tensor: Tensor | None,
    triangle: str,
) -> None:
    if x.numel() == 0:
        return
    backend = dispatch.select("covariance_update", C.device, C.dtype)
    with autocast.disabled(C.device):
        backend.covariance_update(
            C,
            x.reshape(-1, x.shape[-1]),
            None if mask is None else mask.reshape(-1),
            None if weight is None else weight.reshape(-1),
            alpha if alpha_tensor is None else alpha_tensor,
            triangle,
        )


@_covariance_update.register_fake
def _(C, x, mask, weight, alpha, alpha_tensor, triangle) -> None:
    return None
