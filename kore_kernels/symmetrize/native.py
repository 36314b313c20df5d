"""symmetrize_ on the CPU: the compiled kernel, or torch copies. Nothing of C's size is made."""

from __future__ import annotations

from torch import Tensor

from kore_kernels import extension
from kore_kernels.symmetrize import products


def symmetrize(C: Tensor, triangle: str) -> None:
    if extension.refusal() is None:
        extension.symmetrize(C, triangle)
    else:
        products.symmetrize(C, triangle)
