"""The linear layer of the official KORE code: same constructor and parameter names, fused forward and backward passes.

The official names are crossed: ``BLinear`` holds the paper's A (r, d_in) and ``ALinear`` its B (d_out, r) and the bias
of the layer it replaced; ``weight_residual`` (d_out, d_in) is W0 − B₀A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kore_kernels as kk

_CHILDREN, _PARAMETERS = {"ALinear", "BLinear"}, {"weight_residual"}


def plain_forward(module: Any, x: Tensor) -> Tensor:
    """y = B (A x) + b + W_res x with plain operations, in the order of the official module."""
    return module.ALinear(module.BLinear(x)) + F.linear(x, module.weight_residual)


def forward(module: Any, x: Tensor) -> Tensor:
    """The same y through :func:`kore_kernels.lora_fa_linear` where that covers the module as it is; else plain.

    A bias that is trained is added outside the fused operation, which has gradients of x and B only.
    """
    if refusal(module) or not _covers(module, x):
        return plain_forward(module, x)
    bias, A, B = module.ALinear.bias, module.BLinear.weight, module.ALinear.weight
    if bias is None or not bias.requires_grad:
        return kk.lora_fa_linear(x, module.weight_residual, bias, A, B)
    y = kk.lora_fa_linear(x, module.weight_residual, None, A, B)
    return y + bias.to(y.dtype)


class CovSVDLinear(nn.Module):
    """y = W_res x + B (A x) + b, to be imported in place of the official class of that name.

    Parameters, state dict and results are those of the official module. While A (``BLinear``) and ``weight_residual``
    are frozen it runs fused: for the backward pass it keeps h = xAᵀ (tokens, r) and nothing else of its input. While A
    is trained it runs as the official module does.

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: r.
        bias: Whether ``ALinear`` has the bias of the layer.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.BLinear = nn.Linear(in_features, rank, bias=False)
        self.ALinear = nn.Linear(rank, out_features, bias=bias)
        self.weight_residual = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return forward(self, input)


def is_official(module: nn.Module) -> bool:
    """Whether a module holds exactly what the official one holds, whatever its class is called."""
    return module._modules.keys() == _CHILDREN and module._parameters.keys() == _PARAMETERS and not module._buffers


def refusal(module: Any) -> str | None:
    """Why a module with the official parameters cannot run fused in its present state, or None."""
    if type(module.BLinear) is not nn.Linear or type(module.ALinear) is not nn.Linear:
        return "its ALinear or BLinear is not a plain linear layer"
    if module.BLinear.bias is not None:
        return "its BLinear has a bias"
    if module.BLinear.weight.requires_grad:
        return "A (BLinear) is trained, as in the official v1 and Qwen scripts; freeze it for the fused form"
    if module.weight_residual.requires_grad:
        return "its weight_residual is trained"
    if any("forward" in part.__dict__ for part in (module, module.BLinear, module.ALinear)):
        return "its forward pass was replaced on the layer itself, for example by a hook of accelerate"
    return None


def _covers(module: Any, x: Tensor) -> bool:
    """Whether all parts are at hand: whole weights beside x, in dtypes that go together, without hooks."""
    from kore.acceleration.hooks import hooked  # not above: kore.acceleration imports this module

    first, second, residual = module.BLinear, module.ALinear, module.weight_residual
    if hooked(first, second):
        return False
    if any(part.weight.shape != (part.out_features, part.in_features) for part in (first, second)):
        return False
    if residual.shape != (second.out_features, first.in_features):
        return False
    tensors = [first.weight, second.weight, residual, *([] if second.bias is None else [second.bias])]
    if any(tensor.device != x.device for tensor in tensors):
        return False
    return torch.is_autocast_enabled(x.device.type) or all(tensor.dtype == x.dtype for tensor in tensors)
