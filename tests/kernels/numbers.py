"""The error bound that every operation is held to, and tensors in the memory layouts that users have."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(got: Tensor, plain: Tensor, exact: Tensor, reduction: int) -> None:
    """The error against float64 is at most twice that of the same-dtype PyTorch expression, plus a floor.

    The floor is one rounding of the result and the growth of float32 rounding with the length of the sum.
    """
    assert got.dtype == plain.dtype and got.shape == exact.shape
    if not exact.numel():
        return
    scale = exact.abs().max().item()
    unit = torch.finfo(got.dtype).eps
    floor = (unit + min(unit, torch.finfo(torch.float32).eps) * max(reduction, 1) ** 0.5) * scale
    error, allowed = (got.double() - exact).abs().max().item(), (plain.double() - exact).abs().max().item()
    assert error <= 2 * allowed + floor, f"error {error:.3g}, plain PyTorch {allowed:.3g}, floor {floor:.3g}"


def bits(tensor: Tensor) -> Tensor:
    """A view in which equal means equal bit for bit, NaN included."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


LAYOUTS = ("contiguous", "transposed", "columns", "rows", "expanded", "leading")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of the same rows as ``values`` (n, d) (one row repeated for "expanded") with these strides."""
    n, d = values.shape
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "columns":
        wide = torch.full((n, d + 5), float("nan"), dtype=values.dtype)
        wide[:, 2 : 2 + d] = values
        return wide[:, 2 : 2 + d]
    if layout == "rows":
        tall = torch.full((2 * n, d), float("nan"), dtype=values.dtype)
        tall[::2] = values
        return tall[::2]
    if layout == "expanded":
        return values[:1].expand(n, d)
    if layout == "leading":
        return values.reshape(1, n, 1, d).transpose(0, 2)
    return values.clone()
