"""The part of the input energy that an adapter can react to."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from kore.analysis.adapters import read_factors
from kore.covariance import CovarianceSet
from kore.errors import KoreError


def leak(
    adapter: nn.Module | str | os.PathLike[str] | Mapping[str, torch.Tensor], cov: CovarianceSet
) -> dict[str, float]:
    """‖xU‖²_F / ‖x‖²_F of every adapted layer, U an orthonormal basis of the rows of its A (r, d_in).

    This is the part of the input energy that an update BA can react to: 0 for a perfect null space, about
    r / d_in for a random A on inputs without structure. It is computed in float64 as tr(UᵀCU) / tr(C) from the
    covariance of the inputs in question: the old data of the capture, held-out old data, or new data.

    Args:
        adapter: A ``PeftModel``, the directory of a saved adapter, or A (r, d_in) by module name.
        cov: Covariances of the same model; layers it does not hold are left out.

    Raises:
        KoreError: The covariance holds none of the adapter's layers, or is of other sizes.
    """
    factors = read_factors(adapter)
    shared = [module for module in factors if module in cov]
    if not shared:
        raise KoreError("leak: the covariance holds none of the adapter's layers; capture it on the same model")
    order = {group.name: index for index, group in enumerate(cov.groups)}
    values: dict[str, float] = {}
    group_name, C = None, torch.empty(0)
    for module in sorted(shared, key=lambda name: order[cov.group(name).name]):
        if cov.group(module).name != group_name:
            group_name, C = cov.group(module).name, cov[module].to(torch.float64)
        values[module] = _share(row_space(module, factors[module], C), C)
    return {module: values[module] for module in shared}


def leak_and_energy_ratio(U: torch.Tensor, C: torch.Tensor, eigenvalues: torch.Tensor) -> tuple[float, float]:
    """The leak tr(UᵀCU) / tr(C) of a basis, and E(U), its ratio to the least that r directions can have.

    E is that of :func:`kore.nullspace.energy_ratio`, here from a spectrum that is known already.

    Args:
        U: (d, r) float64, orthonormal columns.
        C: (d, d) float64.
        eigenvalues: (d,) of C, descending, as :func:`kore.analysis.spectrum` gives them.
    """
    value, rank = _share(U, C), U.shape[1]
    trace = float(C.diagonal().sum())
    if trace == 0 or rank == 0:
        return value, 1.0
    least = float(eigenvalues[len(eigenvalues) - rank :].sum()) / trace
    return value, 1.0 + (value - least) / max(abs(least), rank * torch.finfo(torch.float64).eps)


def row_space(module: str, factor: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """U (d_in, r) float64 on C's device, an orthonormal basis of the rows of A, its zero rows left out.

    Raises:
        KoreError: A and C are of different d_in; the message names the module.
    """
    if factor.shape[-1] != C.shape[0]:
        raise KoreError(f"{module}: A has d_in = {factor.shape[-1]}, the covariance {C.shape[0]}; capture it again")
    _, singular, vt = torch.linalg.svd(factor.detach().to(device=C.device, dtype=torch.float64), full_matrices=False)
    return vt[singular > singular[0] * max(factor.shape) * torch.finfo(factor.dtype).eps].mT


def _share(U: torch.Tensor, C: torch.Tensor) -> float:
    trace = float(C.diagonal().sum())
    return float((U * (C @ U)).sum()) / trace if trace else 0.0
