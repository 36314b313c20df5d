"""The factors of an adapter by module name, from its files or from a model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore.artifacts import load_tensors, read_json
from kore.errors import ArtifactError, KoreError

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to the weight of a layer: ΔW = scaling · B A.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        scaling: The factor of PEFT, lora_alpha / r, or lora_alpha / √r with rsLoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def read_updates(adapter: str | os.PathLike[str]) -> dict[str, Update]:
    """The update of every layer of a saved LoRA adapter, KORE's or any of PEFT's.

    Raises:
        ArtifactError: A file is missing or broken, or the adapter's update is not scaling · B A (DoRA).
        ConfigError: The update depends on the input (routed experts).
    """
    from peft.utils.other import get_pattern_key

    from kore.adapter.files import check_mergeable

    directory = Path(adapter)
    config, factors = read_json(directory / "adapter_config.json"), _tensors(directory)
    check_mergeable(directory)
    if config.get("use_dora"):
        raise ArtifactError(f"{directory}: a DoRA adapter, whose update is not scaling · B A; expected a plain LoRA")
    updates = {}
    alphas = config.get("alpha_pattern") or {}
    for name, A in factors.items():
        if not name.endswith(_A):
            continue
        module = name.removesuffix(_A)
        if module + _B not in factors:
            raise ArtifactError(f"{directory}: {module} has lora_A but no lora_B; save the adapter again")
        alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
        divisor = math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0]
        updates[module] = Update(A, factors[module + _B], alpha / divisor)
    return updates


def read_factors(adapter: nn.Module | str | os.PathLike[str] | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A (r, d_in) of every adapted layer by module name.

    Args:
        adapter: A ``PeftModel``, the directory of a saved adapter, or the answer itself.
    """
    if isinstance(adapter, Mapping):
        return dict(adapter)
    if isinstance(adapter, nn.Module):
        return _model_factors(adapter)
    return {name.removesuffix(_A): tensor for name, tensor in _tensors(Path(adapter)).items() if name.endswith(_A)}


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    file = directory / "adapter_model.safetensors"
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_tensors(file).items()}
    if not any(name.endswith(_A) for name in tensors):
        raise ArtifactError(f"{file}: holds no lora_A; expected a LoRA adapter")
    return tensors


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
