"""lora_fa_linear: public function, argument checks, torch.library registration and autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kore_kernels import autocast, checks, dispatch
from kore_kernels.padding import padded

_OP = "lora_fa_linear"


def lora_fa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    merged: bool = False,
) -> Tensor:
    """``y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ`` with gradients of ``x`` and ``B`` only: a LoRA linear whose A is frozen.

    Backward: ``dx = g W + s drop(g B A)`` and ``dB = s gᵀ h`` with ``h = drop(x) Aᵀ``. Of the activations only h is
    saved, never x (arXiv 2510.19316 trains B with A frozen). drop(x) = keep ⊙ x / (1 − p), or x when p is 0; the mask
    is computed from ``seed`` wherever it is needed (``dropout.py``), in the backward pass once more, and never stored.

    Args:
        x: (..., d_in), float32, bfloat16, float16 or float64, any strides and any number of rows, none included.
        weight: (d_out, d_in), x's dtype, frozen.
        bias: (d_out,), x's dtype, frozen, or None.
        A: (r, d_in), frozen, in x's dtype, or float32 beside a bfloat16 or float16 x (PEFT keeps adapters so).
        B: (d_out, r), in A's dtype; the one parameter with a gradient.
        scaling: s.
        dropout_p: p, the probability that the second term does not see an element of x; 0 <= p < 1.
        seed: (1,) int64 on x's device, the mask's whole state. None draws one from the default generator of the
            device, so that ``torch.manual_seed`` and gradient checkpointing repeat the mask. Unused when p is 0.
        merged: y = x W'ᵀ + b with W' = W + s B A, formed once here and once more in the backward pass, in a temporary
            of W's size, dtype and rounding. Fewer operations when there are many rows, but what B adds to W is lost as
            far as it is below the resolution of W's dtype. Not with dropout.

    The dtype of A and B is the precision of the second term, of h and of dB: float32 factors are not rounded to x's
    dtype. y and dx have x's dtype. Under autocast every argument is first cast as for ``F.linear``.

    Returns:
        (..., d_out) in x's dtype. Inputs are unchanged; repeating a call with its seed gives the same bits.

    Raises:
        TypeError, ValueError: naming the argument; also when weight, bias or A requires grad.
    """
    for name, argument in (("x", x), ("weight", weight), ("A", A), ("B", B)):
        checks.is_tensor(_OP, name, argument)
    device = x.device
    x, weight, A, B = (autocast.cast(t, device) for t in (x, weight, A, B))
    bias = None if bias is None else autocast.cast(bias, device)
    _check(x, weight, bias, A, B)
    seed = _seed(x, dropout_p, seed)
    if not merged:
        return torch.ops.kore.lora_fa_linear(x, weight, bias, A, B, float(scaling), float(dropout_p), seed)[0]
    if dropout_p:
        raise ValueError(f"{_OP}: merged needs dropout_p = 0, got {dropout_p}; the merged weight sees every input")
    want_h = B.requires_grad and torch.is_grad_enabled()
    return torch.ops.kore.lora_fa_linear_merged(x, weight, bias, A, B, float(scaling), want_h)[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> None:
    checks.dtype(_OP, "x", x, checks.FLOATS)
    checks.linear_layer(_OP, x, weight, bias)
    checks.adapter_factor(_OP, "A", A, x)
    checks.adapter_factor(_OP, "B", B, x, like=("A", A))
    checks.shape(_OP, "A", A, (B.shape[1], x.shape[-1]), "B's rank, x's features")
    checks.shape(_OP, "B", B, (weight.shape[0], A.shape[0]), "weight's rows, A's rank")
    checks.frozen(_OP, "A", A)


def _seed(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The seed to use: the given one, a new one, or None without dropout."""
    checks.probability(_OP, "dropout_p", dropout_p)
    if seed is not None:
        checks.is_tensor(_OP, "seed", seed)
        checks.dtype(_OP, "seed", seed, (torch.int64,))
        checks.shape(_OP, "seed", seed, (1,), "one number")
        checks.same_device(_OP, "seed", seed, x.device, "x")
    if not dropout_p:
        return None
    return torch.randint(2**63 - 1, (1,), device=x.device) if seed is None else seed


@torch.library.custom_op(
    "kore::lora_fa_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling, float dropout_p, Tensor? seed)"
    " -> (Tensor y, Tensor h)",
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, h), h (rows, padded rank); without a seed nothing is dropped."""
    backend = dispatch.select("lora_fa_linear", x.device, x.dtype)
    with autocast.disabled(x.device):
        y, h = backend.forward(_rows(x), weight, bias, A, B, scaling, dropout_p, seed)
    return y.view(*x.shape[:-1], weight.shape[0]), h


@_forward.register_fake
def _(x, weight, bias, A, B, scaling, dropout_p, seed):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, A.new_empty(math.prod(x.shape[:-1]), padded(A.shape[0]))


@torch.library.custom_op(
    "kore::lora_fa_linear_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor? weight, Tensor? A, Tensor B, Tensor? h, float scaling, float dropout_p, Tensor? seed)"
    " -> (Tensor dx, Tensor dB)",
)
def _backward(
    g: Tensor,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dx or empty, dB or empty): dx needs weight and A, dB needs h."""
    backend = dispatch.select("lora_fa_linear", g.device, g.dtype)
    with autocast.disabled(g.device):
        dx, dB = backend.backward(_rows(g), weight, A, B, h, scaling, dropout_p, seed)
    return _gradients(g, B, dx, dB)


@_backward.register_fake
def _(g, weight, A, B, h, scaling, dropout_p, seed):
    return _fake_gradients(g, weight, B, h)


@torch.library.custom_op(
    "kore::lora_fa_linear_merged",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling, bool want_h)"
    " -> (Tensor y, Tensor h)",
)
def _merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, want_h: bool
) -> tuple[Tensor, Tensor]:
    """(y, h), h (rows, padded rank), or empty unless wanted."""
    backend = dispatch.select("lora_fa_linear", x.device, x.dtype)
    with autocast.disabled(x.device):
        y, h = backend.merged_forward(_rows(x), weight, bias, A, B, scaling, want_h)
    return y.view(*x.shape[:-1], weight.shape[0]), A.new_empty(0) if h is None else h


@_merged_forward.register_fake
def _(x, weight, bias, A, B, scaling, want_h):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, A.new_empty(math.prod(x.shape[:-1]), padded(A.shape[0])) if want_h else A.new_empty(0)


@torch.library.custom_op(
    "kore::lora_fa_linear_merged_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor? weight, Tensor? A, Tensor B, Tensor? h, float scaling) -> (Tensor dx, Tensor dB)",
)
def _merged_backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """(dx or empty, dB or empty): dx needs weight and A, dB needs h."""
    backend = dispatch.select("lora_fa_linear", g.device, g.dtype)
    with autocast.disabled(g.device):
        dx, dB = backend.merged_backward(_rows(g), weight, A, B, h, scaling)
    return _gradients(g, B, dx, dB)


@_merged_backward.register_fake
def _(g, weight, A, B, h, scaling):
    return _fake_gradients(g, weight, B, h)


def _rows(tensor: Tensor) -> Tensor:
    """(..., d) as (rows, d)."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _gradients(g: Tensor, B: Tensor, dx: Tensor | None, dB: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = g.new_empty(0) if dx is None else dx.view(*g.shape[:-1], dx.shape[1])
    return dx, B.new_empty(0) if dB is None else dB


def _fake_gradients(g, weight, B, h):
    dx = g.new_empty(0) if weight is None else g.new_empty(*g.shape[:-1], weight.shape[1])
    return dx, B.new_empty(0) if h is None else torch.empty_like(B, memory_format=torch.contiguous_format)


def _save(ctx, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, h: Tensor, seed: Tensor | None) -> None:
    """What the gradients that are asked for need."""
    needs_x, needs_B = x.requires_grad, B.requires_grad
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        weight if needs_x else None, A if needs_x else None, B, h if needs_B else None, seed if needs_x else None
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, A, B, scaling, dropout_p, seed = inputs
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    _save(ctx, x, weight, A, B, output[1], seed)


def _autograd(ctx, g, _grad_h):
    dx = dB = None
    if g is not None:
        weight, A, B, h, seed = ctx.saved_tensors
        dx, dB = torch.ops.kore.lora_fa_linear_backward(g, weight, A, B, h, ctx.scaling, ctx.dropout_p, seed)
        dx, dB = dx if weight is not None else None, dB if h is not None else None
    return dx, None, None, None, dB, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _merged_setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, A, B, scaling, _want_h = inputs
    ctx.scaling = scaling
    _save(ctx, x, weight, A, B, output[1], None)


def _merged_autograd(ctx, g, _grad_h):
    dx = dB = None
    if g is not None:
        weight, A, B, h, _ = ctx.saved_tensors
        dx, dB = torch.ops.kore.lora_fa_linear_merged_backward(g, weight, A, B, h, ctx.scaling)
        dx, dB = dx if weight is not None else None, dB if h is not None else None
    return dx, None, None, None, dB, None, None


_merged_forward.register_autograd(_merged_autograd, setup_context=_merged_setup_context)
