"""covariance_update_ on the CPU: the compiled kernels for a float32 C, BLAS or torch products for anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from kore_kernels import extension
from kore_kernels.covariance_update import products


def covariance_update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    if C.dtype == torch.float32 and extension.refusal() is None:
        extension.covariance_update(C, x, mask, weight, float(alpha), triangle, extension.isa())
    else:
        products.covariance_update(C, x, mask, weight, float(alpha), triangle)
