"""What the official KORE code does at every linear layer of the language model, in our words, to be measured against.

In training :func:`official_linear`. In its capture a forward hook on each linear (no layer shares its sum with another)
takes the input x (tokens, d) of one sample, divides it by |max x|, looks for NaN and for infinity in it, multiplies the
full matrix xᵀx, looks for NaN and for infinity in that, and adds 1/256 of it to the layer's sum. Each look makes the
host wait for the device. Padding is not left out, so samples come one at a time. Source: KORE-LMM/KORE, which has it
from CorDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kore.models import language_model_linears, named_linears
from kore.official.linear import CovSVDLinear, plain_forward

SAMPLES = 256


def official_term(x: Tensor) -> Tensor:
    """x̂ᵀx̂ / 256 with x̂ = x / |max x|, x (n, d), in x's dtype; raises ValueError on NaN or infinity."""
    x = x / x.max().abs()
    _look(x, "input")
    product = x.T @ x
    _look(product, "covariance")
    return product / SAMPLES


def _look(values: Tensor, what: str) -> None:
    if values.isnan().any():
        raise ValueError(f"NaN in the {what}")
    if values.isinf().any():
        raise ValueError(f"infinity in the {what}")


@contextmanager
def official_hooks(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[dict[str, Tensor]]:
    """Hooks for the length of a block; yields the sums by module name, which grow with every forward pass.

    Args:
        model: Its language model's linear layers except the output head are hooked. One sample a pass.
        dtype: Of the products and sums; None for that of the activations, as published.
    """
    sums: dict[str, Tensor] = {}
    linears = named_linears(model)

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            x = inputs[0].detach().squeeze(0)
            term = official_term(x if dtype is None else x.to(dtype))
            if name in sums:
                sums[name] += term
            else:
                sums[name] = term

        return add

    handles = [linears[name].register_forward_hook(hook(name)) for name in language_model_linears(model)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


class _Plain(CovSVDLinear):
    def forward(self, input: Tensor) -> Tensor:
        return plain_forward(self, input)


def official_linear(residual: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> CovSVDLinear:
    """The official layer over given tensors, not copied, with its own forward pass; only B is trained."""
    with torch.device("meta"):
        layer = _Plain(A.shape[1], B.shape[0], A.shape[0], bias=bias is not None)
    layer.weight_residual = nn.Parameter(residual, requires_grad=False)
    layer.BLinear.weight = nn.Parameter(A, requires_grad=False)
    layer.ALinear.weight = nn.Parameter(B)
    if bias is not None:
        layer.ALinear.bias = nn.Parameter(bias, requires_grad=False)
    return layer
