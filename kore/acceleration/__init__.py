"""Fused forward and backward passes inside models that are there already.

``run`` walks a model, ``kinds`` lists the sorts of layers that can run fused, ``fused`` says what such a sort is, and
each sort has a file: ``linear`` for PEFT's LoRA over a plain linear layer. Names are imported when first used, so that
a module that brings a sort of layer can import ``fused`` and be imported by ``kinds``.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Acceleration": "kore.acceleration.run",
    "accelerate": "kore.acceleration.run",
    "decelerate": "kore.acceleration.run",
    "Fused": "kore.acceleration.fused",
    "Kind": "kore.acceleration.fused",
    "MergedError": "kore.acceleration.merged",
    "merged_error": "kore.acceleration.merged",
    "FusedLinear": "kore.acceleration.linear",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kore.acceleration' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value
