"""covariance_update_ on the CPU: the compiled kernels for a float32 C, BLAS or torch products otherwise.

Measured on AVX2 and AVX-512, the compiled kernels are faster than the syrk of OpenBLAS. Portable code is not: without
those instruction sets BLAS is preferred, unless ``KORE_CPU_ISA=portable`` asks for that code by name.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kore_kernels import blas, extension
from kore_kernels.covariance_update import products


def covariance_update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    if C.dtype == torch.float32 and _compiled():
        extension.covariance_update(C, x, mask, weight, float(alpha), triangle, extension.isa())
    else:
        products.covariance_update(C, x, mask, weight, alpha, triangle)


def _compiled() -> bool:
    if extension.refusal():
        return False
    return extension.isa() > 0 or bool(os.environ.get("KORE_CPU_ISA")) or not blas.available()
