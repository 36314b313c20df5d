"""PEFT's LoRA over a plain linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

import kore_kernels as kk
from kore.acceleration.fused import Fused, Kind
from kore.acceleration.hooks import hooked, replaced
from kore.adapter.halves import HalfFrozenLinear

if TYPE_CHECKING:
    from kore.acceleration.groups import Group

# Without gradients and with fewer rows, what is saved on tensors is less than the call of the operation costs.
FEW_ROWS = 32


class FusedLinear(Fused, Linear):
    """A PEFT LoRA layer that computes y = xWᵀ + b + s (drop(x)Aᵀ)Bᵀ with :func:`kore_kernels.lora_fa_linear`.

    Parameters, state dict and settings are the PEFT layer's own. A call that the fused operation does not cover (see
    :func:`refusal`; also adapters switched off, merged, mixed in one batch, hooks on the parts of the layer, weights
    that are elsewhere) takes PEFT's forward pass; so do the few rows of a step of generation.
    """

    plain = Linear

    _fused_group: Group | None = None
    _fused_merged = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        few = not torch.is_grad_enabled() and x.shape[:-1].numel() < FEW_ROWS
        if args or kwargs or few or not covers(self, x):
            # Not super(): a hook may have kept this method for a layer that has its own class back.
            return Linear.forward(self, x, *args, **kwargs)
        if not torch.compiler.is_compiling() and self._fused_group is not None:
            y = self._fused_group.output(self, x)
            if y is not None:
                return y
        W, b, A, B, scaling = parts(self)
        merged = self._fused_merged and W.dtype == _computing_dtype(x)
        return kk.lora_fa_linear(x, W, b, A, B, scaling, dropout_p=dropout_p(self), merged=merged)

    def _apply(self, fn, recurse=True):
        if self._fused_group is not None:
            self._fused_group.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._fused_group is not None:
            self._fused_group.forget()
        super()._load_from_state_dict(*args, **kwargs)


class Parts(NamedTuple):
    """What a layer computes with: W, b, A and B of its active adapter, and s."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float


def parts(layer: Any) -> Parts:
    base, adapter = layer.base_layer, layer.active_adapters[0]
    return Parts(
        base.weight, base.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    )


def dropout_p(layer: Any) -> float:
    """The dropout that the layer's next call takes."""
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def refusal(layer: Any) -> str | None:
    """Why a LoRA layer in its present state cannot run fused, or None."""
    if type(layer.base_layer) is not nn.Linear:
        return f"its base layer is a {type(layer.base_layer).__name__}"
    return adapter_refusal(layer)


def adapter_refusal(layer: Any) -> str | None:
    """Why a LoRA layer, whatever its base, in its present state cannot run fused, or None."""
    adapters, base, As = layer.active_adapters, layer.base_layer, layer.lora_A
    if len(adapters) != 1:
        return f"{len(adapters)} active adapters"
    (adapter,) = adapters
    if adapter not in As:
        return "the active adapter does not change it"
    if getattr(layer, "use_dora", {}).get(adapter) or adapter in getattr(layer, "lora_variant", {}):
        return "DoRA or another variant of LoRA"
    A, B, dropout = As[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if isinstance(A, HalfFrozenLinear) and (A.weight.requires_grad or B.weight.requires_grad):
        return "A is trained beside a constant half (train_a), which the fused operation does not do"
    if A.weight.requires_grad:
        return "A is trained; kore.freeze_a(model) freezes it"
    if base.weight.requires_grad:
        return "its base weight is trained"
    if A.bias is not None or B.bias is not None:
        return "the adapter has a bias"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type(dropout).__name__}"
    if isinstance(dropout, nn.Dropout) and dropout.p == 1:
        return "its dropout drops everything"
    # The compiler of torch 2.6 cannot look into instances; what it gets was looked at before.
    compiling = torch.compiler.is_compiling()
    if not compiling and ("forward" in vars(layer) or any(replaced(part) for part in (base, A, B))):
        return "its forward pass was replaced on the layer itself, for example by a hook of accelerate"
    return None


def covers(layer: Any, x: Tensor) -> bool:
    """Whether the layer can take ``x`` fused, as it is now.

    Its adapter is in use and not merged, and all its parts are at hand: plain weights beside x, in dtypes that go
    together, without hooks.
    """
    if layer.disable_adapters or layer.merged or refusal(layer):
        return False
    adapter = layer.active_adapters[0]
    base, A, B = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    if hooked(base, A, B, layer.lora_dropout[adapter]):
        return False
    W, bias, a, b = base.weight, base.bias, A.weight, B.weight
    if any(w.shape != (part.out_features, part.in_features) for w, part in ((W, base), (a, A), (b, B))):
        return False
    if bias is not None and bias.requires_grad:
        return False
    if not x.device == W.device == a.device == b.device or a.dtype != b.dtype:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return True
    return x.dtype == W.dtype and (a.dtype == x.dtype or (a.dtype == torch.float32 and x.dtype.itemsize == 2))


def _computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer takes ``x``: under autocast the weight is rounded to it first."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


KIND = Kind.of(FusedLinear, refusal, modes=("exact", "merged"))
