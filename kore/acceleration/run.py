"""Walk a model and let its layers run fused, or as before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from kore.acceleration.fused import Fused
from kore.acceleration.kinds import KINDS


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` did; ``print`` shows it.

    Attributes:
        accelerated: Names of the layers that run fused now.
        left: For every other LoRA layer, by name, why it runs as before.
    """

    accelerated: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.accelerated)} LoRA layers run fused, {len(self.left)} as before"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  {reason}: {len(names)} layers, for example {names[0]}" for reason, names in reasons.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Acceleration:
    """Let every LoRA layer of ``model`` whose A is frozen run fused, in place; :func:`decelerate` takes it back.

    Outputs and gradients are PEFT's within rounding; for the backward pass a layer keeps h = xAᵀ (tokens, r) and
    nothing else of its input. Parameters, their names, the optimizer's state and saved adapters are those of the plain
    model, so runs with and without it continue each other. Works on any PEFT model after :func:`kore.freeze_a`.

    Args:
        model: A ``PeftModel``, or a module that holds one; only the class of its LoRA layers is changed. One that was
            accelerated before is looked at anew.

    Returns:
        Which layers run fused, and why the others do not.
    """
    decelerate(model)
    accelerated, left = [], {}
    module: Any
    for name, module in model.named_modules():
        kind = next((kind for kind in KINDS if kind.matches(module)), None)
        if kind is None:
            if isinstance(module, LoraLayer):
                left[name] = f"a {type(module).__module__}.{type(module).__name__}, which has no fused form"
            continue
        reason = kind.refusal(module)
        if reason:
            left[name] = reason
        else:
            module.__class__ = kind.fused(type(module))
            accelerated.append(name)
    return Acceleration(tuple(accelerated), left)


def decelerate(model: nn.Module) -> nn.Module:
    """Give every layer that :func:`accelerate` changed its own class back. Returns ``model``."""
    module: Any
    for module in model.modules():
        if isinstance(module, Fused):
            for name in [name for name in vars(module) if name.startswith("_fused_")]:
                delattr(module, name)
            module.__class__ = module.plain
    return model
