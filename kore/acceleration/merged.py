"""Merged mode: W' = W + s B A is formed for the moment and rounded to W's dtype. How much that loses is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import kore_kernels as kk
from kore.acceleration.hooks import partitioned
from kore.acceleration.linear import FusedLinear, parts

# The largest error of the update that a layer may have and run merged.
GATE = 0.1

# What stands in for a B of zeros: one step of AdamW at the paper's learning rate moves every entry by about that much.
FIRST_STEP = 2e-4

# The largest error of the outputs, in units of that of exact mode.
_OUTPUT_FACTOR = 2

_PROBE_ROWS = 64
_BLOCK = 1024


@dataclass(frozen=True)
class MergedError:
    """What rounding W' = W + s B A to W's dtype does to one layer, against float64.

    Attributes:
        update: ‖(W' − W) − s B A‖ / ‖s B A‖ (Frobenius): the part of the update that the layer does not apply.
        output: ‖y − y*‖ / ‖y*‖ for standard normal inputs, y* in float64.
        exact_output: The same for the exact mode.
        first_step: B is zero, so it was measured for a B of ±2e-4, about what the first step of AdamW makes of it.
    """

    update: float
    output: float
    exact_output: float
    first_step: bool

    def __str__(self) -> str:
        start = " (of a first step: B is zero)" if self.first_step else ""
        return f"update {self.update:.1e}{start}, output {self.output:.1e} (exact mode {self.exact_output:.1e})"


def merged_error(model: nn.Module) -> dict[str, MergedError]:
    """The error of merged mode in every layer that is accelerated and could run merged, with the B it has now.

    The size of the rounding does not depend on B, so the error falls as the update grows. A training loop can ask at
    any time, and call :func:`kore.accelerate` again when the error is small enough.

    Args:
        model: A model after :func:`kore.accelerate`, in any mode; unchanged, as are the random states.

    Returns:
        By the name of the layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedLinear)}
    return {name: measure(layer) for name, layer in layers.items() if merged_refusal(layer) is None}


def merged_refusal(layer: FusedLinear) -> str | None:
    """Why a fused layer cannot run merged, whatever its error, or None."""
    W, _, A, B, _ = parts(layer)
    if getattr(layer.lora_dropout[layer.active_adapters[0]], "p", 0):
        return "dropout, which merged mode does not have"
    if any(t.is_meta or partitioned(t) or type(t) is not nn.Parameter for t in (W, A, B)):
        return "its weights are not here to be measured"
    if not W.device == A.device == B.device:
        return "its weights are on several devices"
    return None


def merged_reason(layer: FusedLinear, gate: float) -> tuple[MergedError | None, str | None]:
    """The error of a fused layer in merged mode, if it can run so, and why it stays exact, or None."""
    reason = merged_refusal(layer)
    if reason:
        return None, reason
    error = measure(layer)
    if not error.update <= gate:
        when = "of a first step, as B is zero," if error.first_step else "of the update"
        return error, f"merged, the error {when} would be over {gate:g}"
    if not error.output <= _OUTPUT_FACTOR * error.exact_output:
        return error, f"merged, the error of its outputs would be over {_OUTPUT_FACTOR} times that of exact mode"
    return error, None


@torch.no_grad()
def measure(layer: FusedLinear) -> MergedError:
    """The error of merged mode in one layer that has no :func:`merged_refusal`; the layer is unchanged."""
    W, b, A, B, scaling = parts(layer)
    W, A, B = W.detach(), A.detach(), B.detach()
    generator = torch.Generator().manual_seed(0)
    first_step = not bool(B.any())
    if first_step:
        signs = torch.randint(0, 2, B.shape, generator=generator).mul_(2).sub_(1)
        B = (FIRST_STEP * signs).to(B)
    x = torch.randn(_PROBE_ROWS, W.shape[1], generator=generator).to(W)
    with torch.autocast(W.device.type, enabled=False):
        lost = size = 0.0
        wide = torch.promote_types(W.dtype, torch.float32)
        for start in range(0, len(W), _BLOCK):
            rows = slice(start, start + _BLOCK)
            update = scaling * (B[rows].double() @ A.double())
            merged = torch.addmm(W[rows].to(wide), B[rows].to(wide), A.to(wide), alpha=scaling).to(W.dtype)
            lost += float((merged.double() - W[rows].double() - update).square().sum())
            size += float(update.square().sum())
        true = x.double() @ W.double().mT + scaling * (x.double() @ A.double().mT @ B.double().mT)
        true = true if b is None else true + b.double()
        outputs = (kk.lora_fa_linear(x, W, b, A, B, scaling, merged=merged) for merged in (True, False))
        output, exact_output = (float((y.double() - true).norm() / true.norm()) for y in outputs)
    return MergedError((lost / size) ** 0.5 if size else 0.0, output, exact_output, first_step)
