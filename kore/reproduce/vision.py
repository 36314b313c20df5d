"""The vision tower of the small Qwen2.5-VL, trained once and shared by its worlds.

It learns what the demo's supervised heads ask and, which is most of its signal, to see what the demo's shipped CLIP
tower sees: every patch regresses that tower's features at its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from kore.demo.vision import HEADS, NONE, Heads, draw, pixels
from kore.reproduce.families import Family, QwenVL, projector
from kore.reproduce.optimizer import Training

TEACHING = 4.0


class PlacedHeads(nn.Module):
    """The demo's heads, and a regression to a teacher's features, over patches of a tower that has no absolute
    positions: each is told its own."""

    def __init__(self, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.place = nn.Linear(2, dim)
        self.heads = Heads(dim)
        self.student = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, teacher_dim))

    def forward(self, rows: torch.Tensor, places: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        placed = rows + self.place(places)
        return self.heads(placed), self.student(placed)


def _places(family: QwenVL, size: tuple[int, int]) -> torch.Tensor:
    """x and y in [-1, 1] of every row of :meth:`QwenVL.see`, (rows, 2)."""
    height, width = (side * family.merge for side in family.grid(size))
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([x, y], -1).view(height // 2, 2, width // 2, 2, 2)
    return grid.permute(0, 2, 1, 3, 4).reshape(-1, 2)


def _outputs(
    family: QwenVL, tower: Any, heads: PlacedHeads, arrays: torch.Tensor, size: tuple[int, int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits and regressions for pictures (n, 32, 32, 3) in one size, so that a batch has one shape."""
    pictures = [Image.fromarray(array.numpy()).resize(size, Image.Resampling.BILINEAR) for array in arrays]
    rows = torch.stack(family.see(tower, pictures))
    return heads(rows, _places(family, size))


@torch.no_grad()
def _taught(teacher: Any, arrays: torch.Tensor) -> torch.Tensor:
    """The teacher's normalised features as maps, (n, width, 4, 4) float16."""
    found = []
    for part in arrays.split(256):
        rows = teacher(pixel_values=pixels(list(part.numpy()))).last_hidden_state[:, 1:]
        rows = nn.functional.layer_norm(rows, rows.shape[-1:])
        side = int(rows.shape[1] ** 0.5)
        found.append(rows.transpose(1, 2).reshape(len(part), -1, side, side).half())
    return torch.cat(found)


def _at_patches(family: QwenVL, taught: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Feature maps at the places of the patches, in the order of :meth:`QwenVL.see`, (n, rows, width)."""
    m = family.merge
    height, width = family.grid(size)
    maps = nn.functional.interpolate(taught.float(), (height * m, width * m), mode="bilinear", align_corners=False)
    maps = maps.view(len(maps), -1, height, m, width, m).permute(0, 2, 4, 3, 5, 1)
    return maps.reshape(len(maps), height * width * m * m, -1)


def train_tower(
    tower: Any,
    teacher: Any,
    family: QwenVL,
    steps: int,
    pool: int,
    batch_size: int = 64,
    rate: float = 2e-3,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train the tower in place.

    Args:
        tower: Of Qwen2.5-VL; its merger is left out.
        teacher: The CLIP tower to learn from.
        family: Of the tower.
        steps: To take.
        pool: Pictures that are drawn.
        batch_size: Pictures in a step.
        rate: Peak learning rate.
        log: Is told a line now and then.

    Returns:
        The accuracy of every head on validation digits.
    """
    started = time.perf_counter()
    rng = np.random.default_rng(33)
    arrays, answers = draw("train", pool, rng)
    taught = _taught(teacher, arrays)
    log(f"vision: {pool} pictures  {time.perf_counter() - started:.0f} s")
    heads = PlacedHeads(tower.config.hidden_size, taught.shape[1])
    parameters = [p for name, p in tower.named_parameters() if not name.startswith("merger.")] + [*heads.parameters()]
    training = Training(parameters, tower.blocks, rate, steps)
    tower.train()
    for step in range(steps):
        drawn = torch.from_numpy(rng.integers(pool, size=batch_size))
        size = family.sizes[rng.integers(len(family.sizes))]
        labels = answers[drawn]
        logits, seen = _outputs(family, tower, heads, arrays[drawn], size)
        losses = (
            nn.functional.cross_entropy(logit, labels[:, i], ignore_index=NONE, reduction="sum")
            for i, logit in enumerate(logits)
        )
        asked = sum(losses, torch.zeros(())) / batch_size
        regression = nn.functional.mse_loss(seen, _at_patches(family, taught[drawn], size))
        loss = asked + TEACHING * regression
        training.step(loss)
        if step % 100 == 0:
            values = f"loss {asked.item():.3f}  regression {regression.item():.3f}"
            log(f"vision {step:5d}  {values}  {time.perf_counter() - started:.0f} s")
    return _accuracy(family, tower, heads)


@torch.no_grad()
def _accuracy(family: QwenVL, tower: Any, heads: PlacedHeads) -> dict[str, float]:
    tower.eval()
    arrays, labels = draw("validation", 800, np.random.default_rng(5))
    sizes = sorted(set(family.sizes))
    parts = [_outputs(family, tower, heads, part, sizes[i % len(sizes)])[0] for i, part in enumerate(arrays.split(100))]
    result = {}
    for i, name in enumerate(HEADS):
        asked = labels[:, i] != NONE
        right = torch.cat([part[i] for part in parts]).argmax(-1)[asked] == labels[asked, i]
        result[name] = round(right.float().mean().item(), 4)
    return result


def align(
    model: Any, family: Family, steps: int, rng: np.random.Generator, pool: int = 4000, batch_size: int = 128
) -> dict[str, float]:
    """Train the projector in place so that a linear reader finds in its tokens what the demo's heads ask.

    LLaVA, too, aligns its projector before the language model learns. Without it some things, such as colour, lie in
    directions of small variance that the language model takes thousands of steps to find.

    Args:
        model: With its vision tower trained.
        family: Of the model.
        steps: To take.
        rng: Of the pictures and batches.
        pool: Pictures that are drawn.
        batch_size: Pictures in a step.

    Returns:
        Accuracy of every head on an eighth as many other pictures, where one of them asks it.
    """
    arrays, labels = draw("train", pool + pool // 8, rng)
    size = family.sizes[0]
    pictures = [Image.fromarray(array.numpy()).resize(size, Image.Resampling.BILINEAR) for array in arrays]
    parts = [pictures[start : start + 256] for start in range(0, len(pictures), 256)]
    rows = torch.stack([row for part in parts for row in family.look(model, part)])
    tokens, width = family.image_tokens(size), family.project(model, rows[0]).shape[-1]
    places, heads = nn.Parameter(torch.zeros(tokens, width)), Heads(width)
    module = projector(model).requires_grad_(True)
    parameters = [*module.parameters(), *heads.parameters(), places]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)

    def logits(chosen: torch.Tensor) -> list[torch.Tensor]:
        projected = family.project(model, rows[chosen].flatten(0, 1)).view(len(chosen), tokens, width)
        return heads(projected + places)

    for _ in range(steps):
        drawn = torch.from_numpy(rng.integers(pool, size=batch_size))
        losses = (
            nn.functional.cross_entropy(logit, labels[drawn, i], ignore_index=NONE, reduction="sum")
            for i, logit in enumerate(logits(drawn))
        )
        loss = sum(losses, torch.zeros(())) / batch_size
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    held = torch.arange(pool, len(labels))
    with torch.no_grad():
        found = [logit.argmax(-1) for logit in logits(held)]
    result = {}
    for i, name in enumerate(HEADS):
        asked = labels[held, i] != NONE
        if not asked.any():
            continue
        result[name] = round((found[i][asked] == labels[held, i][asked]).float().mean().item(), 3)
    return result
