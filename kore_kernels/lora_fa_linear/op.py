"""lora_fa_linear: public function, argument checks, torch.library registration and autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kore_kernels import autocast, checks, dispatch
from kore_kernels.padding import padded

_OP = "lora_fa_linear"


def lora_fa_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float = 1.0
) -> Tensor:
    """``y = x Wᵀ + b + s (x Aᵀ) Bᵀ`` with gradients of ``x`` and ``B`` only: a LoRA linear whose A is frozen.

    Backward: ``dx = g W + s (g B) A`` and ``dB = s gᵀ h`` with ``h = x Aᵀ``. Of the activations only h is saved, never
    x (arXiv 2510.19316 trains B with A frozen).

    Args:
        x: (..., d_in), float32, bfloat16, float16 or float64, any strides and any number of rows, none included.
        weight: (d_out, d_in), x's dtype, frozen.
        bias: (d_out,), x's dtype, frozen, or None.
        A: (r, d_in), frozen, in x's dtype, or float32 beside a bfloat16 or float16 x (PEFT keeps adapters so).
        B: (d_out, r), in A's dtype; the one parameter with a gradient.
        scaling: s.

    The dtype of A and B is the precision of the second term, of h and of dB: float32 factors are not rounded to x's
    dtype. y and dx have x's dtype. Under autocast every argument is first cast as for ``F.linear``.

    Returns:
        (..., d_out) in x's dtype. Inputs are unchanged; repeating a call gives the same bits.

    Raises:
        TypeError, ValueError: naming the argument; also when weight, bias or A requires grad.
    """
    for name, argument in (("x", x), ("weight", weight), ("A", A), ("B", B)):
        checks.is_tensor(_OP, name, argument)
    device = x.device
    x, weight, A, B = (autocast.cast(t, device) for t in (x, weight, A, B))
    bias = None if bias is None else autocast.cast(bias, device)
    _check(x, weight, bias, A, B)
    return torch.ops.kore.lora_fa_linear(x, weight, bias, A, B, float(scaling))[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> None:
    checks.dtype(_OP, "x", x, checks.FLOATS)
    checks.linear_layer(_OP, x, weight, bias)
    checks.adapter_factor(_OP, "A", A, x)
    checks.adapter_factor(_OP, "B", B, x, like=("A", A))
    checks.shape(_OP, "A", A, (B.shape[1], x.shape[-1]), "B's rank, x's features")
    checks.shape(_OP, "B", B, (weight.shape[0], A.shape[0]), "weight's rows, A's rank")
    checks.frozen(_OP, "A", A)


@torch.library.custom_op(
    "kore::lora_fa_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling) -> (Tensor, Tensor)",
)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(y, h), h (rows, padded rank)."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    backend = dispatch.select("lora_fa_linear", x.device, x.dtype)
    with autocast.disabled(x.device):
        y, h = backend.forward(rows, weight, bias, A, B, scaling)
    return y.view(*x.shape[:-1], weight.shape[0]), h


@_forward.register_fake
def _(x, weight, bias, A, B, scaling):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, A.new_empty(math.prod(x.shape[:-1]), padded(A.shape[0]))


@torch.library.custom_op(
    "kore::lora_fa_linear_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor? weight, Tensor? A, Tensor B, Tensor? h, float scaling) -> (Tensor, Tensor)",
)
def _backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """(dx or empty, dB or empty): dx needs weight and A, dB needs h."""
    rows = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
    backend = dispatch.select("lora_fa_linear", g.device, g.dtype)
    with autocast.disabled(g.device):
        dx, dB = backend.backward(rows, weight, A, B, h, scaling)
    dx = g.new_empty(0) if dx is None else dx.view(*g.shape[:-1], dx.shape[1])
    return dx, B.new_empty(0) if dB is None else dB


@_backward.register_fake
def _(g, weight, A, B, h, scaling):
    dx = g.new_empty(0) if weight is None else g.new_empty(*g.shape[:-1], weight.shape[1])
    return dx, B.new_empty(0) if h is None else torch.empty_like(B, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, A, B, scaling = inputs
    _y, h = output
    needs_x, needs_B = x.requires_grad, B.requires_grad
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.scaling = scaling
    ctx.save_for_backward(weight if needs_x else None, A if needs_x else None, B, h if needs_B else None)


def _autograd(ctx, g, _grad_h):
    if g is None:
        return None, None, None, None, None, None
    weight, A, B, h = ctx.saved_tensors
    dx, dB = torch.ops.kore.lora_fa_linear_backward(g, weight, A, B, h, ctx.scaling)
    return dx if weight is not None else None, None, None, None, dB if h is not None else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
