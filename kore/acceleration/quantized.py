"""PEFT's LoRA over a base layer that bitsandbytes or torchao quantised.

The base weight is there in the compute dtype only while a pass of its layer needs it: it is dequantised into a
temporary in the forward pass and again in the backward pass, and the allocator gives the next layer the same memory.
The packages are not imported here; a layer of theirs is known by the name of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kore.acceleration.fused import Fused, Kind
from kore.acceleration.hooks import hooked
from kore.acceleration.linear import adapter_refusal, dropout_p, parts


@dataclass(frozen=True)
class Quantisation:
    """What is to be known of one sort of quantised base layer.

    Attributes:
        refusal: Why a base layer in its present state cannot be dequantised, or None.
        dtypes: From base layer and x: the dtype to compute in and the dtype of y, both as in PEFT's forward pass; None
            where PEFT's decides.
        dequantizer: From base layer and dtype: what returns W (d_out, d_in) in that dtype, in new memory.
    """

    refusal: Callable[[Any], str | None]
    dtypes: Callable[[Any, Tensor], tuple[torch.dtype, torch.dtype] | None]
    dequantizer: Callable[[Any, torch.dtype], Callable[[], Tensor]]


class FusedQuantized(Fused):
    """A PEFT LoRA layer that computes y = xWᵀ + b + s (drop(x) Aᵀ)Bᵀ with W dequantised for the moment.

    Parameters, state dict and settings are the PEFT layer's own, and the quantised weight is only read. Of the
    activations h = drop(x) Aᵀ is kept for the backward pass, and the seed of the dropout mask. A call that the fused
    operation does not cover takes PEFT's forward pass; so does inference, for which the packages have their kernels.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        quantisation = _quantisation(layer)
        trains = layer.training or torch.is_grad_enabled()
        dtypes = quantisation.dtypes(layer.base_layer, x) if trains and covers(layer, x) else None
        if args or kwargs or dtypes is None:
            # Not super(): a hook may have kept this method for a layer that has its own class back.
            return _plain(layer).forward(layer, x, *args, **kwargs)
        compute, out = dtypes
        _, bias, A, B, scaling = parts(layer)
        p = dropout_p(layer)
        y = _Function.apply(
            x.to(compute),
            None if bias is None else bias.to(compute),
            A,
            B,
            torch.randint(2**63 - 1, (1,), device=x.device) if p else None,
            quantisation.dequantizer(layer.base_layer, compute),
            _factor_dtype(A, compute),
            scaling,
            p,
        )
        return y.to(out)


def refusal(layer: Any) -> str | None:
    """Why a LoRA layer in its present state cannot run fused, or None."""
    return adapter_refusal(layer) or _quantisation(layer).refusal(layer.base_layer)


def covers(layer: Any, x: Tensor) -> bool:
    """Whether the layer can take ``x`` fused: its adapter is in use, and its parts are beside x, whole, unhooked."""
    if layer.disable_adapters or layer.merged or refusal(layer):
        return False
    adapter = layer.active_adapters[0]
    base, A, B = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    if hooked(base, A, B, layer.lora_dropout[adapter]) or any(part.weight.device != x.device for part in (base, A, B)):
        return False
    if any(part.weight.shape != (part.out_features, part.in_features) for part in (A, B)):
        return False
    return A.weight.dtype == B.weight.dtype and (base.bias is None or not base.bias.requires_grad)


def _factor_dtype(A: Tensor, compute: torch.dtype) -> torch.dtype:
    """The dtype of A and B beside ``compute``: their own (that of an enclosing autocast) or the next that goes."""
    own = _lowered(A.device) or A.dtype
    return own if own == compute else torch.promote_types(torch.float32, compute)


def _lowered(device: torch.device) -> torch.dtype | None:
    """The dtype of an enclosing autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _Function(torch.autograd.Function):
    """y, and the gradients of x and B; W is dequantised in each pass and not kept in between."""

    @staticmethod
    def forward(ctx, x, bias, A, B, seed, dequantized, dtype, scaling, dropout_p):
        a, b = A.to(dtype), B.to(dtype)
        y, h = torch.ops.kore.lora_fa_linear(x, dequantized(), bias, a, b, scaling, dropout_p, seed)
        needs_x, needs_B = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.save_for_backward(A if needs_x else None, B, h if needs_B else None, seed)
        ctx.settings = dequantized, dtype, scaling, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        A, B, h, seed = ctx.saved_tensors
        dequantized, dtype, scaling, dropout_p = ctx.settings
        W, a = (None, None) if A is None else (dequantized(), A.to(dtype))
        dx, dB = torch.ops.kore.lora_fa_linear_backward(g, W, a, B.to(dtype), h, scaling, dropout_p, seed)
        return None if A is None else dx, None, None, None if h is None else dB.to(B.dtype), *[None] * 5


def _refusal_4bit(base: Any) -> str | None:
    state = getattr(base.weight, "quant_state", None)
    if state is None or tuple(state.shape) != (base.out_features, base.in_features):
        return "its base weight is not quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes packed its base weight for inference on the CPU"
    return None


def _dtypes_4bit(base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    if not base.compute_type_is_set:  # bitsandbytes settles it in the first forward pass
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return base.compute_dtype or x.dtype, x.dtype


def _dequantizer_4bit(base: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    weight, state = base.weight.data, base.weight.quant_state
    return lambda: dequantize_4bit(weight, state).to(dtype)


def _refusal_8bit(base: Any) -> str | None:
    import bitsandbytes.functional

    if not hasattr(bitsandbytes.functional, "int8_vectorwise_dequant"):
        return "bitsandbytes is older than 0.45, its layout of the weight is another"
    if base.weight.dtype != torch.int8:
        return "its base weight is not quantised yet"
    if _scales(base) is None:
        return "its base weight has lost its scales"
    return None


def _dtypes_8bit(base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    return _lowered(x.device) or x.dtype, x.dtype


def _dequantizer_8bit(base: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    # As in the backward pass of bitsandbytes; its int8_vectorwise_dequant needs two float32 temporaries beside W.
    weight, scales = base.weight.data, _scales(base)
    return lambda: weight.to(dtype).mul_(scales.unsqueeze(1).div(127))


def _scales(base: Any) -> Any:
    """Of the rows of W; the first forward pass of bitsandbytes moves them from the weight to the state."""
    return base.weight.SCB if base.state.SCB is None else base.state.SCB


def _refusal_torchao(base: Any) -> str | None:
    weight = base.weight
    if not type(weight).__module__.startswith("torchao.") or not hasattr(weight, "dequantize"):
        return f"its base weight is a {type(weight).__name__}, which cannot be dequantised"
    # The first two are of the classes of torchao 0.14 and later, the third of those before.
    if any(
        getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "act_pre_scale", "input_quant_func")
    ):
        return "torchao quantises or scales its input too, not the weight alone"
    return None


def _dtypes_torchao(base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
    compute = _lowered(x.device) or base.weight.dtype
    return (compute, x.dtype) if x.dtype == base.weight.dtype else None


def _dequantizer_torchao(base: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    weight = base.weight
    return lambda: weight.dequantize().to(dtype)


_QUANTISATIONS = {
    "peft.tuners.lora.bnb.Linear4bit": Quantisation(_refusal_4bit, _dtypes_4bit, _dequantizer_4bit),
    "peft.tuners.lora.bnb.Linear8bitLt": Quantisation(_refusal_8bit, _dtypes_8bit, _dequantizer_8bit),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": Quantisation(_refusal_torchao, _dtypes_torchao, _dequantizer_torchao),
}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _quantisation(layer: Any) -> Quantisation:
    return _QUANTISATIONS[_name(_plain(layer))]


def _plain(layer: Any) -> type[nn.Module]:
    """PEFT's class of a layer."""
    return getattr(layer, "plain", type(layer))


def _fused(plain: type[nn.Module]) -> type[Fused]:
    return _FUSED.setdefault(plain, type(f"Fused{plain.__name__}", (FusedQuantized, plain), {"plain": plain}))


_FUSED: dict[type, type[Fused]] = {}

KIND = Kind(lambda module: _name(type(module)) in _QUANTISATIONS, _fused, refusal)
