"""From pieces of knowledge to conversations that teach them: dialogues, recognition, captions and visual questions.

    from kore.augmentation import AugmentConfig, augment
    summary = augment("knowledge.jsonl", AugmentConfig(), "augmented")

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kore.augmentation.config import AugmentConfig
    from kore.augmentation.forecast import Estimate, estimate
    from kore.augmentation.items import Knowledge, load_knowledge
    from kore.augmentation.run import Summary, augment
    from kore.augmentation.types import Failure, ItemResult, KnowledgeItem, Sample

__all__ = [
    "AugmentConfig",
    "Estimate",
    "Failure",
    "ItemResult",
    "Knowledge",
    "KnowledgeItem",
    "Sample",
    "Summary",
    "augment",
    "estimate",
    "load_knowledge",
]
_HOMES = {
    "AugmentConfig": "config",
    "Estimate": "forecast",
    "estimate": "forecast",
    "Knowledge": "items",
    "Summary": "run",
    "augment": "run",
    "load_knowledge": "items",
    "Failure": "types",
    "ItemResult": "types",
    "KnowledgeItem": "types",
    "Sample": "types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
