"""Hooks on the parts of a layer, which a fused forward pass does not call."""

from __future__ import annotations

from typing import Any


def hooked(*parts: Any) -> bool:
    """Whether a part has a hook that would be missed.

    Those of DeepSpeed are not: with ZeRO-3 they gather the parameters of the part, and DeepSpeed gathers a parameter
    as well when the forward pass of another module reads it; from then on it does so around that module's passes.
    """
    return any(
        not getattr(hook, "__module__", "").startswith("deepspeed.")
        for part in parts
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        for hook in hooks.values()
    )


def partitioned(parameter: Any) -> bool:
    """Whether the parameter is one of DeepSpeed ZeRO-3, which brings it together for one layer at a time."""
    return hasattr(parameter, "ds_id")
