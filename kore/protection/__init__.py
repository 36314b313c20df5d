"""What training can be made to leave alone beside the null space: a penalty on what the old model would notice."""

from __future__ import annotations

from kore.protection.two_sided import TwoSided, two_sided

__all__ = ["TwoSided", "two_sided"]
