"""The frozen factor A of one layer, from its weight and a basis of the null space of its input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kore.errors import ModelError

_BLOCK = 1 << 19  # entries of W0 that are in float64 at a time


def thin_init(weight: torch.Tensor, basis: torch.Tensor, scale: str = "sqrt") -> torch.Tensor:
    """A (r, d_in) float64 from the SVD of W0 U: A = √Σ Vᵀ Uᵀ (arXiv 2510.19316), or Vᵀ Uᵀ.

    svd(W0 U Uᵀ) = U* Σ (U V)ᵀ follows from svd(W0 U) = U* Σ Vᵀ, so a (d_out, r) problem takes the place of the
    paper's (d_out, d_in) one. Where W0 U has fewer than r non-zero singular values (d_out < r, or rank
    deficiency), the paper's A has rows of zeros, whose columns of B could never learn: V is completed to r
    orthonormal directions of the null space, and these rows get the smallest non-zero √σ (1 for W0 U = 0).

    In memory beside W0 and U: 4 MiB of W0 in float64, and some (d_out, r) and (d_in, r) matrices.

    Args:
        weight: W0 (d_out, d_in), any floating dtype and device; not changed.
        basis: U (d_in, r), orthonormal columns; A is computed on its device.
        scale: ``"sqrt"`` or ``"orthonormal"``.
    """
    basis = basis.to(torch.float64)
    d_out, r = weight.shape[0], basis.shape[1]
    thin = basis.new_empty(d_out, r)
    step = max(1, _BLOCK // weight.shape[1])
    for first in range(0, d_out, step):
        rows = weight[first : first + step].detach().to(basis.device, torch.float64)
        torch.matmul(rows, basis, out=thin[first : first + step])
    small = torch.linalg.qr(thin, mode="r").R if d_out > r else thin  # the same Σ and V
    _, singular, vt = torch.linalg.svd(small, full_matrices=d_out < r)
    if scale == "sqrt":
        peak = float(singular[0]) if singular.numel() else 0.0
        kept = singular[singular > max(thin.shape) * torch.finfo(torch.float64).eps * peak]
        rows = basis.new_full((r,), float(kept[-1]) if kept.numel() else 1.0)
        rows[: kept.numel()] = kept
        vt = rows.sqrt()[:, None] * vt
    return vt @ basis.mT


def read_weight(name: str, linear: Any) -> torch.Tensor:
    """W0 (d_out, d_in) where the layer computes: of a transposed, quantised, offloaded or sharded layer too.

    A sharded weight is gathered, which all processes that hold a part of it must do together.
    """
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    with _loaded(linear):
        weight = linear.weight
        if weight.is_meta:
            raise ModelError(f"{name}: its weight is on the meta device; load the model with its weights")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: bitsandbytes packed its 4-bit weight for inference on this CPU, for good; "
                "load the model again for the adapter"
            )
        if hasattr(weight, "ds_id"):
            weight = _gathered(weight)
        elif is_sharded(linear):
            weight = weight.detach().full_tensor()
        elif type(weight).__module__.startswith("torchao."):
            weight = weight.dequantize()
        elif not weight.is_floating_point():
            weight = dequantize_module_weight(linear)
        weight = weight.detach()
    return weight.mT if isinstance(linear, Conv1D) else weight


def is_sharded(linear: Any) -> bool:
    """Whether processes hold parts of the weight: a DTensor, as FSDP2 makes it, or a parameter of DeepSpeed ZeRO-3."""
    weight = linear.weight
    return isinstance(weight, torch.Tensor) and (hasattr(weight, "full_tensor") or hasattr(weight, "ds_id"))


def _gathered(weight: Any) -> torch.Tensor:
    """A copy of a whole ZeRO-3 parameter, which all processes must ask for together; it stays partitioned."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def device_of(linear: Any) -> torch.device:
    """Where the factor of a layer is computed: on its GPU, else on the CPU."""
    device = getattr(linear.weight, "device", None)
    return device if isinstance(device, torch.device) and device.type == "cuda" else torch.device("cpu")


@contextlib.contextmanager
def _loaded(linear: nn.Module) -> Iterator[None]:
    if hasattr(linear, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(linear):
            yield
    else:
        yield
