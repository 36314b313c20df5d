"""The adapted layers of a PEFT model, as penalties look at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kore.errors import ConfigError
from kore.models import base_model


@dataclass(frozen=True)
class Factors:
    """A change B A of one layer: A (r, d_in), and B (d_out, r) or None where only the inputs it reads are known."""

    A: torch.Tensor
    B: torch.Tensor | None = None


@dataclass(frozen=True)
class AdaptedLayer:
    """A LoRA layer and the name of its adapter. The factors are looked up at each use, since FSDP2 replaces them."""

    layer: Any
    adapter: str

    @property
    def A(self) -> torch.Tensor:
        """(r, d_in)."""
        return whole(self.layer.lora_A[self.adapter].weight)

    @property
    def B(self) -> torch.Tensor:
        """(d_out, r)."""
        return whole(self.layer.lora_B[self.adapter].weight)

    def base_weight(self) -> torch.Tensor:
        """W₀, (d_out, d_in). Raises ConfigError where it is quantised."""
        weight = self.layer.get_base_layer().weight
        if not weight.is_floating_point() or type(weight) is not nn.Parameter:
            raise ConfigError("options.previous: weights needs W0 in floating point, and it is quantised")
        W0: torch.Tensor = weight.detach()
        return W0.T if getattr(self.layer, "fan_in_fan_out", False) else W0


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """By the name of the layer in the base model. Raises ConfigError where the model has no LoRA."""
    from peft.tuners.lora import LoraLayer

    found = {
        name: AdaptedLayer(module, adapter)
        for name, module in base_model(model).named_modules()
        if isinstance(module, LoraLayer)
        for adapter in module.active_adapters
        if adapter in module.lora_A
    }
    if not found:
        raise ConfigError(f"expected a model with a LoRA adapter, got {type(model).__name__} without one")
    return found


def whole(parameter: Any) -> torch.Tensor:
    """A parameter that FSDP2 may have sharded; its gradient is cut into shards again."""
    tensor: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return tensor


def at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(tensor.dtype, torch.float32)
