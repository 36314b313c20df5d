"""What an adapter lets through, and how a covariance's energy is spread."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore.artifacts import load_tensors
from kore.covariance import CovarianceSet
from kore.errors import ArtifactError, KoreError

_PREFIX, _SUFFIX = "base_model.model.", ".lora_A.weight"


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
    factors = _factors(adapter)
    shared = [module for module in factors if module in cov]
    if not shared:
        raise KoreError("leak: the covariance holds none of the adapter's layers; capture it on the same model")
    order = {group.name: index for index, group in enumerate(cov.groups)}
    values: dict[str, float] = {}
    group_name, C = None, torch.empty(0)
    for module in sorted(shared, key=lambda name: order[cov.group(name).name]):
        if cov.group(module).name != group_name:
            group_name, C = cov.group(module).name, cov[module].to(torch.float64)
        values[module] = _leak(module, factors[module], C)
    return {module: values[module] for module in shared}


def spectrum(C: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (d,) of a symmetric (d, d) matrix in float64, descending."""
    return torch.linalg.eigvalsh(C.detach().to(torch.float64)).flip(0)


def _leak(module: str, factor: torch.Tensor, C: torch.Tensor) -> float:
    if factor.shape[-1] != C.shape[0]:
        raise KoreError(f"{module}: A has d_in = {factor.shape[-1]}, the covariance {C.shape[0]}; capture it again")
    trace = float(C.diagonal().sum())
    if trace == 0:
        return 0.0
    _, singular, vt = torch.linalg.svd(factor.detach().to(device=C.device, dtype=torch.float64), full_matrices=False)
    U = vt[singular > singular[0] * max(factor.shape) * torch.finfo(factor.dtype).eps].mT
    return float((U * (C @ U)).sum()) / trace


def _factors(adapter: nn.Module | str | os.PathLike[str] | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(adapter, Mapping):
        return dict(adapter)
    if isinstance(adapter, nn.Module):
        return _model_factors(adapter)
    file = Path(adapter) / "adapter_model.safetensors"
    factors = {
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX): tensor
        for name, tensor in load_tensors(file).items()
        if name.endswith(_SUFFIX)
    }
    if not factors:
        raise ArtifactError(f"{file}: holds no lora_A; expected a LoRA adapter")
    return factors


def _model_factors(model: nn.Module) -> dict[str, torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    from kore.models import base_model

    factors: dict[str, Any] = {
        name: module.lora_A[module.active_adapters[0]].weight
        for name, module in base_model(model).named_modules()
        if isinstance(module, LoraLayer) and module.active_adapters and module.active_adapters[0] in module.lora_A
    }
    if not factors:
        raise KoreError(f"leak: expected a model with a LoRA adapter, got {type(model).__name__} without one")
    return factors
