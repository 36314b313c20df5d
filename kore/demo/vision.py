"""Supervised training of the demo's vision tower, so that it sees before the language model learns to speak.

One attention-pooled head an attribute: the digit, its colour, both digits of a pair, their number, the shape, and
which of 96 practice glyphs is drawn: those of the old animals and others, never those of the new knowledge.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from kore.demo.world import drawing, old

PRACTICE_GLYPHS = range(old.ANIMAL_GLYPHS.start, old.ANIMAL_GLYPHS.start + 96)
NONE = -100
HEADS = {
    "digit": 10,
    "colour": len(drawing.COLOURS),
    "left_digit": 10,
    "left_colour": len(drawing.COLOURS),
    "right_digit": 10,
    "right_colour": len(drawing.COLOURS),
    "count": 4,
    "shape": len(drawing.SHAPES),
    "glyph": len(PRACTICE_GLYPHS),
}


class Heads(nn.Module):
    """Learned queries over the patch tokens, one linear classifier each."""

    def __init__(self, dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(HEADS), dim) / math.sqrt(dim))
        self.key = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.classifiers = nn.ModuleList(nn.Linear(dim, classes) for classes in HEADS.values())

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        tokens = self.norm(tokens)
        scores = self.queries @ self.key(tokens).transpose(1, 2) / math.sqrt(tokens.shape[-1])
        pooled = scores.softmax(-1) @ tokens
        return [classifier(pooled[:, i]) for i, classifier in enumerate(self.classifiers)]


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels(images: list) -> torch.Tensor:
    """What CLIPImageProcessor gives for 32-pixel pictures with mean and std 0.5: (n, 3, 32, 32)."""
    return _pixels(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def _example(split: str, rng: np.random.Generator):
    label = dict.fromkeys(HEADS, NONE)
    colours = tuple(drawing.COLOURS)
    kind = rng.choice(4, p=[0.22, 0.4, 0.06, 0.32])
    chosen = [int(c) for c in rng.permutation(len(colours))]
    names = [colours[c] for c in chosen]
    if kind == 3:
        if rng.random() < 0.2:
            label["shape"] = int(rng.integers(len(drawing.SHAPES)))
            return drawing.draw_shape(drawing.SHAPES[label["shape"]], names[0], rng), label
        label["glyph"] = int(rng.integers(len(PRACTICE_GLYPHS)))
        return drawing.draw_glyph(PRACTICE_GLYPHS[label["glyph"]], names[0], rng), label
    number = (1, 2, int(rng.integers(1, 5)))[kind]
    digits = [int(d) for d in rng.integers(10, size=number)]
    pool = drawing.digit_indices(split)
    indices = [pool[d][rng.integers(len(pool[d]))] for d in digits]
    image = drawing.draw_digits(indices, names[:number], ("single", "pair", "corners")[kind], rng)
    if kind == 0:
        label.update(digit=digits[0], colour=chosen[0])
    elif kind == 1:
        label.update(left_digit=digits[0], right_digit=digits[1], left_colour=chosen[0], right_colour=chosen[1])
    else:
        label.update(count=number - 1)
    return image, label


def draw(split: str, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, (size, 32, 32, 3) uint8, and a label for every head, (size, heads), NONE where a head is not asked."""
    examples = [_example(split, rng) for _ in range(size)]
    pictures = np.stack([np.asarray(image) for image, _ in examples])
    return torch.from_numpy(pictures), torch.tensor([list(label.values()) for _, label in examples])


def train_tower(
    tower: Any, steps: int, seed: int, batch_size: int = 128, pool: int = 80_000, log=print
) -> dict[str, float]:
    """Train a CLIP vision model in place; returns the accuracy of every head on the validation digits."""
    rng = np.random.default_rng((seed, 31))
    pictures, answers = draw("train", pool, rng)
    heads = Heads(tower.config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    tower.train()
    started = time.perf_counter()
    for step in range(steps):
        drawn = torch.from_numpy(rng.integers(pool, size=batch_size))
        images, labels = _pixels(pictures[drawn]), answers[drawn]
        logits = heads(tower(pixel_values=images).last_hidden_state[:, 1:])
        losses = (
            nn.functional.cross_entropy(logit, labels[:, i], ignore_index=NONE, reduction="sum")
            for i, logit in enumerate(logits)
        )
        loss = sum(losses, torch.zeros(())) / batch_size
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            log(f"vision {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s")
    return _accuracy(tower, heads)


@torch.no_grad()
def _accuracy(tower: Any, heads: Heads) -> dict[str, float]:
    tower.eval()
    images, labels = draw("validation", 2000, np.random.default_rng(5))
    logits = heads(tower(pixel_values=_pixels(images)).last_hidden_state[:, 1:])
    result = {}
    for i, name in enumerate(HEADS):
        asked = labels[:, i] != NONE
        right = logits[i].argmax(-1)[asked] == labels[asked, i]
        result[name] = round(right.float().mean().item(), 4)
    return result
