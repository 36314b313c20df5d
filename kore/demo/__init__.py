"""`kore demo`: a small real LLaVA learns new creatures by five methods, and shows what each one forgets."""

from __future__ import annotations

from typing import Any

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from kore.demo.comparison import run

        return run
    raise AttributeError(f"module 'kore.demo' has no attribute {name!r}")
