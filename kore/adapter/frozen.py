"""A that stays frozen, whatever PEFT, a Trainer or a checkpoint does with trainable flags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kore.errors import ModelError


class FrozenLinear(nn.Linear):
    """A linear layer without bias whose weight never trains.

    PEFT's ``set_adapter``, ``load_adapter`` (so the Trainer's resume) and ``enable_adapter_layers`` make the
    parameters of an adapter's sub-layers trainable again, through ``requires_grad_`` or ``parameters`` of the
    sub-layer. Here the first does nothing and the second hands out a detached alias of the weight. The forward
    pass detaches too, so no gradient reaches the weight even where its flag is set by hand on the whole model,
    and ``train`` clears such a flag. The parameter itself is an ordinary one: it is counted, moved, saved and
    loaded under its usual name.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FrozenLinear:
        """Take over the weight parameter of ``linear`` (no copy); ``linear`` is to be dropped."""
        if linear.bias is not None:
            raise ValueError("FrozenLinear: expected a linear layer without bias")
        frozen = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        frozen.weight = linear.weight
        frozen.weight.requires_grad = False
        frozen.training = linear.training
        return frozen

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.detach())

    def requires_grad_(self, requires_grad: bool = True) -> FrozenLinear:
        return self

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield self.weight.detach()

    def train(self, mode: bool = True) -> FrozenLinear:
        self.weight.requires_grad = False
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen"


def freeze_a(model: nn.Module) -> nn.Module:
    """Freeze A of every LoRA layer for good: each ``lora_A`` becomes a :class:`FrozenLinear`, in place.

    Works on any PEFT LoRA over linear layers, also one that a Trainer holds already: weights, parameter objects
    and state-dict keys stay the same. An adapter that is added later under another name is not frozen.

    Args:
        model: A ``PeftModel``, or a module that holds one.

    Returns:
        ``model``.

    Raises:
        ModelError: The adapter trains A beside a constant half (``train_a``).
    """
    from peft.tuners.lora import LoraLayer

    from kore.adapter.halves import HalfFrozenLinear

    for module_name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for name, lora_a in module.lora_A.items():
                if isinstance(lora_a, HalfFrozenLinear):
                    raise ModelError(
                        f"{module_name}: was made to train A (train_a); for a frozen A make another adapter"
                    )
                if isinstance(lora_a, nn.Linear) and not isinstance(lora_a, FrozenLinear):
                    module.lora_A[name] = FrozenLinear.from_linear(lora_a)
    return model
