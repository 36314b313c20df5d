"""What a layer's outputs lose when the smallest components of its weight are discarded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

METHODS = {
    "svd": "W0",
    "asvd": "W0 diag(C)^(1/4)",
    "co-svd": "W0 C",
    "co-svd-root": "W0 C^(1/2)",
}


def discard_errors(
    weight: torch.Tensor, C: torch.Tensor, data: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """‖(W0 − W_r) x‖_F / ‖W0 x‖_F for every number r of discarded components, by method and data set.

    Each method takes the svd of W0 S = U Σ Vᵀ, drops the r smallest components and maps the rest back with S⁻¹:

    ===============  =============  ==================================================================================
    method           S
    ===============  =============  ==================================================================================
    ``svd``          1
    ``asvd``         diag(C)^(1/4)  ASVD with α = 1/2, the root mean square of an input channel for its mean |x|
    ``co-svd``       C              as CorDA and KORE decompose
    ``co-svd-root``  C^(1/2)        the smallest error that rank allows on the data of C
    ===============  =============  ==================================================================================

    W_r = U_k U_kᵀ W0 with the k kept left vectors, whatever S is, so nothing is inverted and a C of any rank will do.
    The error is exact for the data that H was captured on: with D = W0 − W_r, ‖D x‖² = tr(D H Dᵀ), which is the sum of
    uᵀ W0 H W0ᵀ u over the discarded u. Float64 throughout.

    Args:
        weight: W0 (d_out, d_in).
        C: (d_in, d_in), the covariance that the methods see.
        data: Covariances H of the inputs on which errors are measured, by name.

    Returns:
        For each method and name a vector (min(d_out, d_in) + 1,): its entry r is the error with r discarded.
    """
    weight, C = weight.double(), C.double()
    eigenvalues, Q = torch.linalg.eigh(C)
    scaled = {
        "svd": weight,
        "asvd": weight * C.diagonal().clamp(min=0).pow(0.25),
        "co-svd": weight @ C,
        "co-svd-root": (weight @ Q) * eigenvalues.clamp(min=0).sqrt(),
    }
    errors: dict[str, dict[str, torch.Tensor]] = {}
    outputs = {name: output_energy(weight, H.double()) for name, H in data.items()}
    for method in METHODS:
        U = torch.linalg.svd(scaled[method], full_matrices=False).U
        rows = U.mT @ weight
        errors[method] = {}
        for name, H in data.items():
            parts = ((rows @ H.double()) * rows).sum(1).flip(0).clamp(min=0)
            lost = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
            errors[method][name] = (lost / outputs[name] if outputs[name] > 0 else lost * 0).sqrt().cpu()
    return errors


def output_energy(weight: torch.Tensor, C: torch.Tensor) -> float:
    """‖x Wᵀ‖²_F = tr(W C Wᵀ), C = Σ xᵀx; both of one dtype and device."""
    return max(float(((weight @ C) * weight).sum()), 0.0)
