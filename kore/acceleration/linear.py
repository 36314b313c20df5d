"""PEFT's LoRA over a plain linear layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import nn

import kore_kernels as kk
from kore.acceleration.fused import Fused, Kind


class FusedLinear(Fused, Linear):
    """A PEFT LoRA layer that computes y = xWᵀ + b + s (xAᵀ)Bᵀ with :func:`kore_kernels.lora_fa_linear`.

    Parameters, state dict and settings are the PEFT layer's own. A call that the fused operation does not cover (see
    :func:`refusal`; also adapters switched off, merged, mixed in one batch, hooks on the parts of the layer, weights
    that are elsewhere) takes PEFT's forward pass.
    """

    plain = Linear

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or self.disable_adapters or self.merged or refusal(self) or not _covers(self, x):
            return super().forward(x, *args, **kwargs)
        adapter = self.active_adapters[0]
        base: Any = self.base_layer
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        return kk.lora_fa_linear(x, base.weight, base.bias, A.weight.detach(), B.weight, self.scaling[adapter])


def refusal(layer: LoraLayer) -> str | None:
    """Why a LoRA layer in its present state cannot run fused, or None."""
    if type(layer.base_layer) is not nn.Linear:
        return f"its base layer is a {type(layer.base_layer).__name__}"
    if len(layer.active_adapters) != 1:
        return f"{len(layer.active_adapters)} active adapters"
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A:
        return "the active adapter does not change it"
    if getattr(layer, "use_dora", {}).get(adapter) or adapter in getattr(layer, "lora_variant", {}):
        return "DoRA or another variant of LoRA"
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if A.weight.requires_grad:
        return "A is trained; kore.freeze_a(model) freezes it"
    if layer.base_layer.weight.requires_grad:
        return "its base weight is trained"
    if A.bias is not None or B.bias is not None:
        return "the adapter has a bias"
    dropout = layer.lora_dropout[adapter]
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training:
        return "dropout on the adapter's input"
    return None


def _covers(layer: FusedLinear, x: torch.Tensor) -> bool:
    """Whether all parts of the layer are at hand: plain weights beside x, in dtypes that go together, without hooks."""
    adapter = layer.active_adapters[0]
    base, A, B = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in (base, A, B)):
        return False
    W, a, b = base.weight, A.weight, B.weight
    if any(part.weight.shape != (part.out_features, part.in_features) for part in (base, A, B)):
        return False
    if base.bias is not None and base.bias.requires_grad:
        return False
    if not x.device == W.device == a.device == b.device or a.dtype != b.dtype:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return True
    return x.dtype == W.dtype and (a.dtype == x.dtype or (a.dtype == torch.float32 and x.dtype.itemsize == 2))


KIND = Kind.of(FusedLinear, refusal)
