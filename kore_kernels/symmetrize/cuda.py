"""symmetrize_ has no compiled kernel for GPUs: it is passed on."""

from __future__ import annotations

from torch import Tensor

from kore_kernels import dispatch


def symmetrize(C: Tensor, triangle: str) -> None:
    dispatch.next_to_native("symmetrize", C.device, C.dtype).symmetrize(C, triangle)
