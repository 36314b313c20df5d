"""Walk a model and let its layers run fused, or as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from kore.acceleration.fused import Fused
from kore.acceleration.groups import Group, find_groups
from kore.acceleration.kinds import KINDS
from kore.acceleration.linear import FusedLinear
from kore.acceleration.merged import GATE, MergedError, merged_reason
from kore.errors import KoreError

MODES = ("exact", "merged")


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` did; ``print`` shows it.

    Attributes:
        accelerated: Names of the layers that run fused now.
        left: For every other LoRA layer, by name, why it runs as before.
        groups: Names of the layers, of those above, that are computed together.
        merged: The error of merged mode, by name, for the layers that run merged or would but for their error.
        exact: For every accelerated layer that was to run merged and does not, by name, why.
    """

    accelerated: tuple[str, ...]
    left: dict[str, str]
    groups: tuple[tuple[str, ...], ...] = ()
    merged: dict[str, MergedError] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.accelerated)} LoRA layers run fused, {len(self.left)} as before"]
        lines += _by_reason(self.left)
        sorts: dict[str, list[str]] = {}
        for group in self.groups:
            parent, names = _common_parent(group)
            sorts.setdefault(" + ".join(names), []).append(parent)
        lines += [
            f"  computed together, from one x Aᵀ: {members}, {len(parents)} times, for example in {parents[0]}"
            for members, parents in sorts.items()
        ]
        merged = {name: error for name, error in self.merged.items() if name not in self.exact}
        if merged or self.exact:
            lines.append(f"{len(merged)} of the fused layers run merged, {len(self.exact)} exact")
        for which, errors in (("merged", merged), ("exact", {n: e for n, e in self.merged.items() if n in self.exact})):
            if errors:
                worst = max(errors, key=lambda name: errors[name].update)
                lines.append(f"  largest error merged, of those that run {which}: {errors[worst]}, in {worst}")
        return "\n".join(lines + _by_reason(self.exact))


def accelerate(model: nn.Module, *, mode: str = "exact", group: bool = True, gate: float | None = None) -> Acceleration:
    """Let every LoRA layer of ``model`` whose A is frozen run fused, in place; :func:`decelerate` takes it back.

    Outputs and gradients are those of the layers themselves within rounding; for the backward pass a layer keeps
    h = xAᵀ (tokens, r) and nothing else of its input. Parameters, their names, the optimizer's state and saved adapters
    are those of the plain model, so runs with and without it continue each other. Works on any PEFT model after
    :func:`kore.freeze_a`.

    Layers of one parent whose A have one row space, as KORE gives q, k and v, or gate and up, are computed together:
    h once, and their input gradients in one product with Aᵀ.

    ``mode="merged"`` forms W' = W + s B A for each pass and rounds it to W's dtype: fewer operations where rows are
    many. The rounding is of a fixed size, so with weights in bfloat16 most of a first step is lost and a hundredth of
    what some hundred steps have made; in float32 nothing is. A layer runs merged only if the error of its update,
    measured now, is within ``gate``; for a B of zeros that of a first step is measured. Every other layer runs exact.
    The errors are in the result; :func:`kore.acceleration.merged_error` measures them at any time, and another call
    of ``accelerate`` decides anew.

    Args:
        model: A ``PeftModel``, or a module that holds one; only the class of its LoRA layers is changed. One that was
            accelerated before is looked at anew.
        mode: ``"exact"`` or ``"merged"``.
        group: Compute layers that share their basis together. Merged layers never are.
        gate: For merged mode, 0.1 unless given.

    Returns:
        Which layers run fused, and why the others do not.

    Raises:
        KoreError: ``mode`` is none of these, or ``gate`` is given without merged mode or is not positive.
    """
    if mode not in MODES:
        raise KoreError(f"accelerate: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if gate is not None and not (mode == "merged" and gate > 0):
        raise KoreError(f"accelerate: gate is a positive error allowed in merged mode, got {gate!r} in mode {mode!r}")
    decelerate(model)
    fused: dict[str, Any] = {}
    left: dict[str, str] = {}
    merged: dict[str, MergedError] = {}
    exact: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = next((kind for kind in KINDS if kind.matches(module)), None)
        if kind is None:
            if isinstance(module, LoraLayer):
                left[name] = f"a {type(module).__module__}.{type(module).__name__}, which has no fused form"
            continue
        reason = kind.refusal(module)
        if reason:
            left[name] = reason
            continue
        fused[name] = module
        module.__class__ = kind.fused(type(module))  # type: ignore[assignment]
        if mode == "merged":
            error, reason = None, "this sort of layer has no merged mode"
            if mode in kind.modes:
                error, reason = merged_reason(module, GATE if gate is None else gate)
            if error is not None:
                merged[name] = error
            if reason:
                exact[name] = reason
            else:
                module._fused_merged = True
    groups = _make_groups(fused) if group else ()
    return Acceleration(tuple(fused), left, groups, merged, exact)


def decelerate(model: nn.Module) -> nn.Module:
    """Give every layer that :func:`accelerate` changed its own class back. Returns ``model``.

    Raises:
        KoreError: A layer's class was changed again since, as ``fully_shard`` does to the layers it is called on.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Fused)]
    for module in layers:
        if "plain" not in vars(type(module)):
            raise KoreError(
                f"decelerate: expected the classes that accelerate gave, got a {type(module).__name__}; "
                "accelerate and decelerate a model before it is wrapped"
            )
    for module in layers:
        for name in [name for name in vars(module) if name.startswith("_fused_")]:
            delattr(module, name)
        module.__class__ = module.plain
    return model


def _make_groups(fused: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Put exact layers of one parent that share a basis together. Returns their names."""
    siblings: dict[str, list[str]] = {}
    for name, layer in fused.items():
        if isinstance(layer, FusedLinear) and not layer._fused_merged:
            siblings.setdefault(name.rpartition(".")[0], []).append(name)
    groups = []
    for names in siblings.values():
        for members in find_groups([fused[name] for name in names]):
            groups.append(tuple(name for name in names if any(fused[name] is member for member in members)))
            Group(members, groups[-1])
    return tuple(groups)


def _common_parent(names: Sequence[str]) -> tuple[str, list[str]]:
    parent = names[0].rpartition(".")[0]
    return parent, [name.rpartition(".")[2] for name in names]


def _by_reason(layers: dict[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in layers.items():
        reasons.setdefault(reason, []).append(name)
    return [f"  {reason}: {len(names)} layers, for example {names[0]}" for reason, names in reasons.items()]
