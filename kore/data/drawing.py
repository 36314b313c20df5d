"""Conversations drawn at random, in the shares of the files they come from."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kore.data.types import Conversation


def draw(conversations: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """``count`` of the conversations (all, where there are no more), without replacement, in their order.

    Each file gives its share of them, count · n_file / n, rounded by largest remainders, so that what a plain draw
    gives on average is so in every draw. Conversations that name no file are one file.
    """
    files: dict[str, list[int]] = {}
    for number, conversation in enumerate(conversations):
        files.setdefault(conversation.source.rpartition(":")[0], []).append(number)
    count = min(count, len(conversations))
    shares = {name: divmod(count * len(members), len(conversations)) for name, members in files.items()}
    missing = count - sum(whole for whole, _ in shares.values())
    rounded_up = sorted(files, key=lambda name: -shares[name][1])[:missing]
    generator = random.Random(seed)
    chosen: list[int] = []
    for name, members in files.items():
        chosen += generator.sample(members, shares[name][0] + (name in rounded_up))
    return [conversations[number] for number in sorted(chosen)]
