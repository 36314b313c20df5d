"""Random streams that depend on a seed and on names, and on nothing else: not on order, threads or other items."""

from __future__ import annotations

import hashlib
import json
import random


def stream(seed: int, *names: str | int) -> random.Random:
    """The random stream of these names; the same on every machine and in every run."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
