"""A trained, in stock PEFT: a LoRA of rank 2r whose second half is constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kore.errors import ConfigError, ModelError


class HalfFrozenLinear(nn.Linear):
    """A linear layer without bias that trains one half of its weight W; the other half is a constant.

    The trained half is the first r rows or columns. The gradient of the others is exactly 0, so AdamW without weight
    decay, and every other optimizer that steps by its gradients alone, leaves them as they are, to the bit. That does
    not hang on flags or hooks: it survives ``set_adapter``, ``load_adapter`` (so the Trainer's resume), copies and
    pickles. The parameter is the ordinary one of the whole weight, moved, saved, loaded and merged under its own name.

    The products of a backward pass are those of the trained half. The gradient and the optimizer's state are of the
    whole weight, since they belong to its parameter: for the constant half they are zeros, and wasted.

    Attributes:
        trained: r.
        dim: 0 where r rows are trained, 1 where r columns are.
    """

    trained: int
    dim: int

    @classmethod
    def from_linear(cls, linear: nn.Linear, trained: int, dim: int) -> HalfFrozenLinear:
        """Take over the weight parameter of ``linear`` (no copy); ``linear`` is to be dropped."""
        if linear.bias is not None:
            raise ValueError("HalfFrozenLinear: expected a linear layer without bias")
        half = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        half.weight, half.training = linear.weight, linear.training
        half.trained, half.dim = trained, dim
        return half

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, W = input, self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, W = x.to(dtype), W.to(dtype)
        if not (torch.is_grad_enabled() and W.requires_grad):
            return F.linear(x, W)
        y: torch.Tensor = _HalfLinear.apply(x, W, self.trained, self.dim)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.trained} {('rows', 'columns')[self.dim]} trained"


class _HalfLinear(torch.autograd.Function):
    """y = x Wᵀ; the gradient of W is 0 but for its first r rows (dim 0) or columns (dim 1)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, r: int, dim: int) -> torch.Tensor:
        # Of x the backward pass needs what the trained half was multiplied by.
        ctx.save_for_backward(x if dim == 0 else x[..., :r], W)
        ctx.r, ctx.dim = r, dim
        return F.linear(x, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, W = ctx.saved_tensors
        dx = g @ W if ctx.needs_input_grad[0] else None
        dW = None
        if ctx.needs_input_grad[1]:
            dW = torch.zeros_like(W)
            x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            if ctx.dim == 0:
                dW[: ctx.r] = g[:, : ctx.r].mT @ x
            else:
                dW[:, : ctx.r] = g.mT @ x
        return dx, dW, None, None


def freeze_halves(model: nn.Module) -> nn.Module:
    """Hold the second half of every LoRA layer constant for good: of lora_A [A; A0] A0, of lora_B [B, −B0] B0.

    In place: every ``lora_A`` and ``lora_B`` becomes a :class:`HalfFrozenLinear`; parameter objects and state-dict
    keys stay the same.

    Args:
        model: A ``PeftModel``, or a module that holds one, whose ranks are even.

    Returns:
        ``model``.

    Raises:
        ModelError: A rank is odd; the message names the layer.
    """
    from peft.tuners.lora import LoraLayer

    for module_name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for factors, dim in ((module.lora_A, 0), (module.lora_B, 1)):
            for name, linear in factors.items():
                if isinstance(linear, nn.Linear) and not isinstance(linear, HalfFrozenLinear):
                    rank = linear.weight.shape[dim]
                    if rank % 2:
                        raise ModelError(f"{module_name}: expected an adapter of two halves, its rank is {rank}")
                    factors[name] = HalfFrozenLinear.from_linear(linear, rank // 2, dim)
    return model


def start_of_b(weight: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """B0 = W0 Aᵀ (A Aᵀ)⁻¹ (d_out, r) float64, so that B0 A = W0 P is what the paper takes out of W0 to train it.

    P = U Uᵀ projects onto the rows of A, which span U; with the paper's A = √Σ Vᵀ this is its B0 = U* √Σ.

    Args:
        weight: W0 (d_out, d_in), any floating dtype; not changed.
        A: (r, d_in) of full rank.
    """
    q, r = torch.linalg.qr(A.to(weight.device, torch.float64).mT)  # A = rᵀ qᵀ
    thin = weight.detach().to(torch.float64) @ q
    return torch.linalg.solve_triangular(r.mT, thin, upper=False, left=False)


def check_weight_decay(model: nn.Module, weight_decay: float) -> None:
    """Raise ConfigError where weight decay would change the constant halves of an adapter with ``train_a``."""
    if weight_decay and any(isinstance(module, HalfFrozenLinear) for module in model.modules()):
        raise ConfigError(
            f"train.weight_decay: expected 0 for an adapter with train_a, got {weight_decay}; decay would shrink the "
            "constant halves A0 and B0 too, and with them the model that the adapter starts from"
        )
