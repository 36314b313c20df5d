"""A contact sheet of the demo's world."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 8
_TEXT = "#7d8590"


def pictures(comparison: Any) -> Figure:
    """One question of every old task that has a picture, then every animal of the first seed with its name."""
    from matplotlib.figure import Figure

    from kore.demo.comparison import FIRST_WORLD
    from kore.demo.world.new import creatures, picture

    old = {question.type: question for question in comparison.old_questions if question.image is not None}
    tiles: list[tuple[Any, str]] = [(_open(q.image), _caption(q.text, q.answer)) for q in list(old.values())[:_COLUMNS]]
    for creature in creatures(FIRST_WORLD):
        tiles.append(
            (picture(creature, "test", 0), f"{creature.name}\n{creature.home}, {creature.food}\n{creature.keeper}")
        )
    rows = -(-len(tiles) // _COLUMNS)
    figure = Figure(figsize=(9.6, 1.75 * rows), layout="constrained")
    for ax in figure.subplots(rows, _COLUMNS, squeeze=False).ravel():
        ax.axis("off")
    for ax, (image, caption) in zip(figure.axes, tiles):
        ax.imshow(image, interpolation="nearest")
        ax.set_title(caption, fontsize=6.8, color=_TEXT, y=-0.04, va="top")
    return figure


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _caption(question: str, answer: str) -> str:
    asked = question.split(". Answer")[0].split("? ")[0]
    return "\n".join([*textwrap.wrap(asked, 24), *textwrap.wrap(f"→ {answer}", 24)])
