"""Hooks on the parts of a layer, which a fused forward pass does not call."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook


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


def replaced(part: Any) -> bool:
    """Whether somebody put another forward pass on a part, one that does more than to move its input to its device.

    That alone is what accelerate does to the layers of a model that is spread over devices and not offloaded.
    """
    forward = vars(part).get("forward")
    if forward is None:
        return False
    hook: Any = getattr(part, "_hf_hook", None)
    aligns = type(hook) is AlignDevicesHook and not hook.offload and not hook.io_same_device
    if aligns and getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks":
        forward = part._old_forward
    return getattr(forward, "__func__", None) is not type(part).forward


def partitioned(parameter: Any) -> bool:
    """Whether the parameter is one of DeepSpeed ZeRO-3, which brings it together for one layer at a time."""
    return hasattr(parameter, "ds_id")
