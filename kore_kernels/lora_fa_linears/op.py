"""lora_fa_linears: public function, argument checks, torch.library registration and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kore_kernels import autocast, checks, dispatch
from kore_kernels.padding import padded

_OP = "lora_fa_linears"


def lora_fa_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    U: Tensor,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scaling: float = 1.0,
) -> list[Tensor]:
    """``y_i = x W_iᵀ + b_i + s (h R_iᵀ) B_iᵀ`` with ``h = x U``: frozen-A linears that share x and a basis.

    This is ``lora_fa_linear`` with ``A_i = R_i Uᵀ`` for each layer of a group that reads one input (q, k and v; gate
    and up), whose null-space basis is therefore the same. x U is computed and saved once; the group's input gradients
    meet in r dimensions, ``dx = Σ g_i W_i + s (Σ g_i B_i R_i) Uᵀ``, and ``dB_i = s g_iᵀ (h R_iᵀ)``. A layer whose
    output has no gradient costs nothing in the backward pass.

    Args:
        x: (..., d_in), float32, bfloat16, float16 or float64, any strides and any number of rows, none included.
        weights, biases: one (d_out_i, d_in) and one (d_out_i,) or None for each layer, x's dtype, frozen.
        U: (d_in, r), frozen, in x's dtype, or float32 beside a bfloat16 or float16 x.
        Rs: one (r, r) for each layer, in U's dtype, frozen.
        Bs: one (d_out_i, r) for each layer, in U's dtype; the parameters with a gradient.
        scaling: s.

    Precision and autocast are those of ``lora_fa_linear``.

    Returns:
        One (..., d_out_i) for each layer, in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument; also when a weight, a bias, U or an R requires grad.
    """
    for name, argument in (("x", x), ("U", U)):
        checks.is_tensor(_OP, name, argument)
    counts = [len(weights), len(biases), len(Rs), len(Bs)]
    if len(set(counts)) != 1 or not weights:
        raise ValueError(f"{_OP}: weights, biases, Rs and Bs need one entry for each layer, got {counts} entries")
    for i, (weight, R, B) in enumerate(zip(weights, Rs, Bs)):
        for name, argument in ((f"weights[{i}]", weight), (f"Rs[{i}]", R), (f"Bs[{i}]", B)):
            checks.is_tensor(_OP, name, argument)
    device = x.device
    x, U = autocast.cast(x, device), autocast.cast(U, device)
    weights, Rs, Bs = ([autocast.cast(t, device) for t in group] for group in (weights, Rs, Bs))
    biases = [None if bias is None else autocast.cast(bias, device) for bias in biases]
    _check(x, weights, biases, U, Rs, Bs)
    present, biased = [bias for bias in biases if bias is not None], [bias is not None for bias in biases]
    return torch.ops.kore.lora_fa_linears(x, weights, present, biased, U, Rs, Bs, float(scaling))[0]


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    U: Tensor,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
) -> None:
    checks.dtype(_OP, "x", x, checks.FLOATS)
    checks.adapter_factor(_OP, "U", U, x)
    checks.frozen(_OP, "U", U)
    r = U.shape[1]
    for i, (weight, bias, R, B) in enumerate(zip(weights, biases, Rs, Bs)):
        checks.linear_layer(_OP, x, weight, bias, names=(f"weights[{i}]", f"biases[{i}]"))
        checks.adapter_factor(_OP, f"Rs[{i}]", R, x, like=("U", U))
        checks.shape(_OP, f"Rs[{i}]", R, (r, r), "U's rank, twice")
        checks.frozen(_OP, f"Rs[{i}]", R)
        checks.adapter_factor(_OP, f"Bs[{i}]", B, x, like=("U", U))
        checks.shape(_OP, f"Bs[{i}]", B, (weight.shape[0], r), f"the rows of weights[{i}], U's rank")
    checks.shape(_OP, "U", U, (x.shape[-1], r), "x's features, rank")


@torch.library.custom_op(
    "kore::lora_fa_linears",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, bool[] biased, Tensor U, Tensor[] Rs, Tensor[] Bs,"
    " float scaling) -> (Tensor[], Tensor)",
)
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    biased: Sequence[bool],
    U: Tensor,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scaling: float,
) -> tuple[list[Tensor], Tensor]:
    """(every y_i, h), h (rows, padded rank); ``biases`` holds those of the layers that are ``biased``."""
    present = iter(biases)
    every_bias = [next(present) if has else None for has in biased]
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    backend = dispatch.select("lora_fa_linears", x.device, x.dtype)
    with autocast.disabled(x.device):
        ys, h = backend.forward(rows, weights, every_bias, U, Rs, Bs, scaling)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys], h


@_forward.register_fake
def _(x, weights, biases, biased, U, Rs, Bs, scaling):
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return ys, U.new_empty(math.prod(x.shape[:-1]), padded(U.shape[1]))


@torch.library.custom_op(
    "kore::lora_fa_linears_backward",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor[] weights, Tensor? U, Tensor[] Rs, Tensor[] Bs, Tensor? h, float scaling)"
    " -> (Tensor, Tensor[])",
)
def _backward(
    gs: Sequence[Tensor],
    weights: Sequence[Tensor],
    U: Tensor | None,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    h: Tensor | None,
    scaling: float,
) -> tuple[Tensor, list[Tensor]]:
    """(dx or empty, every dB_i or none): dx needs weights and U, the dB_i need h."""
    lead = gs[0].shape[:-1]
    rows = [g.reshape(math.prod(lead), g.shape[-1]) for g in gs]
    backend = dispatch.select("lora_fa_linears", gs[0].device, gs[0].dtype)
    with autocast.disabled(gs[0].device):
        dx, dBs = backend.backward(rows, weights, U, Rs, Bs, h, scaling)
    return gs[0].new_empty(0) if dx is None else dx.view(*lead, dx.shape[1]), dBs


@_backward.register_fake
def _(gs, weights, U, Rs, Bs, h, scaling):
    dx = gs[0].new_empty(0) if U is None else gs[0].new_empty(*gs[0].shape[:-1], U.shape[0])
    return dx, [] if h is None else [torch.empty_like(B, memory_format=torch.contiguous_format) for B in Bs]


def _setup_context(ctx, inputs, output) -> None:
    x, weights, biases, _biased, U, Rs, Bs, scaling = inputs
    _ys, h = output
    needs_x, ctx.needs_B = x.requires_grad, [B.requires_grad for B in Bs]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.scaling, ctx.layers, ctx.biases = scaling, len(Bs), len(biases)
    ctx.save_for_backward(
        U if needs_x else None, h if any(ctx.needs_B) else None, *Rs, *Bs, *(weights if needs_x else ())
    )


def _autograd(ctx, gs, _grad_h):
    n = ctx.layers
    U, h, *rest = ctx.saved_tensors
    Rs, Bs, weights = rest[:n], rest[n : 2 * n], rest[2 * n :]
    dx, none, grads_B = None, [None] * n, [None] * n
    used = [i for i, g in enumerate(gs) if g is not None and (U is not None or ctx.needs_B[i])]
    if used:
        gs, Rs, Bs = ([group[i] for i in used] for group in (gs, Rs, Bs))
        weights = [weights[i] for i in used] if weights else []
        dx, dBs = torch.ops.kore.lora_fa_linears_backward(gs, weights, U, Rs, Bs, h, ctx.scaling)
        for i, dB in zip(used, dBs):
            grads_B[i] = dB if ctx.needs_B[i] else None
    return dx if U is not None else None, none, [None] * ctx.biases, None, None, none, grads_B, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
