"""KORE: inject new knowledge into large multimodal models without making them forget (arXiv 2510.19316).

Data flows one way: model, capture, covariance, null space, adapter, training, export, evaluation.
Names are imported when first used, so ``import kore`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# A submodule must not carry the name of a public function: importing it would hide the function.
_PUBLIC = {
    "capture_covariance": "kore.capture",
    "capture_output_gradients": "kore.capture",
    "plan_capture": "kore.capture",
    "CovarianceSet": "kore.covariance",
    "OutputGradients": "kore.covariance",
    "load_covariance": "kore.covariance",
    "load_output_gradients": "kore.covariance",
    "merge_covariance": "kore.covariance",
    "NullSpace": "kore.nullspace",
    "null_space": "kore.nullspace",
    "KoreConfig": "kore.adapter",
    "get_kore_model": "kore.adapter",
    "load_kore_model": "kore.adapter",
    "save_adapter": "kore.adapter",
    "freeze_a": "kore.adapter",
    "accelerate": "kore.acceleration",
    "decelerate": "kore.acceleration",
    "two_sided": "kore.protection",
    "load_model": "kore.models",
    "AugmentConfig": "kore.augmentation",
    "augment": "kore.augmentation",
    "TrainConfig": "kore.training",
    "train": "kore.training",
    "merge": "kore.merging",
    "evaluate": "kore.evaluation",
    "KoreError": "kore.errors",
}
_MODULES = ("adapter", "analysis", "baselines", "data", "metrics", "models", "recipes")

__all__ = ["__version__", *sorted(_PUBLIC), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"kore.{name}")
    else:
        raise AttributeError(f"module 'kore' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
