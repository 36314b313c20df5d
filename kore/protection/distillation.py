"""Distillation from the untouched model, which is the trained one with its adapter switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kore.errors import ConfigError
from kore.penalty import Forward, Penalty


class Distillation(Penalty):
    """λ · (1/n) Σ T² KL(softmax(z₀/T) ‖ softmax(z/T)) over the n labelled tokens of a step.

    z are the logits of a PEFT model, z₀ those of the model without its adapter, on the same inputs.

    Attributes:
        strength: λ.
        temperature: T.
    """

    def __init__(self, model: Any, strength: float, temperature: float) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ConfigError(
                f"distillation: expected a model with an adapter to switch off, got {type(model).__name__}; without "
                "one the untouched model would be a second copy"
            )
        self._model = model
        self.strength, self.temperature = strength, temperature

    def identity(self) -> dict[str, Any]:
        return {"distillation": {"strength": self.strength, "temperature": self.temperature}}

    def batch(self, forward: Forward) -> torch.Tensor | None:
        """The share of one forward pass: its sum over the labelled tokens, divided by ``forward.count``."""
        if self.strength == 0:
            return None
        labelled = forward.labelled
        old = self.teacher(forward)[labelled]
        return divergence(forward.logits[labelled], old, self.temperature) * self.strength / forward.count

    @torch.no_grad()
    def teacher(self, forward: Forward) -> torch.Tensor:
        """z₀, (batch, positions, vocabulary), at the positions of ``forward.logits``."""
        with untouched(self._model):
            logits: torch.Tensor = self._model(**forward.inputs).logits
        return logits if "logits_to_keep" in forward.inputs else logits[:, :-1]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, new: torch.Tensor, old: torch.Tensor, temperature: float) -> torch.Tensor:
        dtype = torch.promote_types(new.dtype, torch.float32)
        q, p = ((logits.to(dtype) / temperature).log_softmax(-1) for logits in (new, old))
        value = (p.exp() * (p - q)).sum() * temperature**2
        ctx.save_for_backward(q.exp_().sub_(p.exp_()).mul_(temperature).to(new.dtype))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def divergence(new: torch.Tensor, old: torch.Tensor, temperature: float) -> torch.Tensor:
    """Σ T² KL(softmax(old/T) ‖ softmax(new/T)) over the rows, a scalar, computed in float32 or better.

    Its gradient is T (softmax(new/T) − softmax(old/T)), formed as this difference: exactly 0 where both are alike.

    Args:
        new: (rows, vocabulary), gets the gradient.
        old: (rows, vocabulary), gets none.
        temperature: T.
    """
    value: torch.Tensor = _Divergence.apply(new, old, temperature)  # type: ignore[no-untyped-call]
    return value


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """A PEFT model without its adapter and in evaluation mode; trained flags and modes come back as they were."""
    training = [module for module in model.modules() if module.training]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
