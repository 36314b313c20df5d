"""What keeps the splits apart: own digit pictures, own random streams, own phrasings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Phrasings:
    """Wordings of one question by split; `train` may be used for learning, the others never are."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def pick(self, split: str, rng: np.random.Generator, **words: str) -> str:
        wordings = getattr(self, split)
        return wordings[rng.integers(len(wordings))].format(**words)


@dataclass(frozen=True)
class Item:
    """A question with its answer and, for most tasks, a picture; ``history`` are the rounds before it."""

    task: str
    image: Image.Image | None
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()


def stream(seed: int, split: str, *what: int) -> np.random.Generator:
    """An independent random stream for one seed and split."""
    return np.random.default_rng((seed, SPLITS.index(split), *what))
