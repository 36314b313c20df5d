"""Pictures of the demo's world: handwritten digits in colour, simple shapes, and glyphs made of strokes."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
COLOURS = {
    "red": (230, 50, 45),
    "green": (50, 190, 70),
    "blue": (70, 110, 245),
    "yellow": (240, 220, 50),
    "purple": (175, 70, 210),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "arrow")
_OVERSAMPLE = 4
_DIGITS = Path(__file__).parent.parent / "data" / "digits.npz"


@lru_cache(maxsize=1)
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits: images (1797, 8, 8) uint8 in 0 ... 16, labels (1797,)."""
    with np.load(_DIGITS) as stored:
        return stored["images"], stored["labels"]


@lru_cache(maxsize=3)
def digit_indices(split: str) -> tuple[tuple[int, ...], ...]:
    """Indices of the real digit pictures of one split, by digit; every picture belongs to exactly one split."""
    labels = digits()[1]
    order = np.random.default_rng(0).permutation(len(labels))
    share = {"train": slice(0, 1350), "validation": slice(1350, 1550), "test": slice(1550, None)}[split]
    return tuple(tuple(int(i) for i in order[share] if labels[i] == digit) for digit in range(10))


def canvas(rng: np.random.Generator) -> np.ndarray:
    """A dark background of a random tint, (32, 32, 3) float."""
    tint = rng.uniform(5, 55, size=3)
    return np.broadcast_to(tint, (SIZE, SIZE, 3)).copy()


def finish(image: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Add pixel noise and make a PIL picture."""
    noisy = image + rng.normal(0, 6, size=image.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def paste(image: np.ndarray, alpha: np.ndarray, colour: str, centre: tuple[float, float], rng) -> None:
    """Blend a coverage map (h, w) in [0, 1] in a colour onto the picture, in place, centred at (x, y)."""
    height, width = alpha.shape
    left = int(np.clip(round(centre[0] - width / 2), 0, SIZE - width))
    top = int(np.clip(round(centre[1] - height / 2), 0, SIZE - height))
    rgb = np.asarray(COLOURS[colour]) * rng.uniform(0.88, 1.0)
    region = image[top : top + height, left : left + width]
    region += (rgb - region) * alpha[..., None]


def digit_alpha(index: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Coverage map of one real handwritten digit, enlarged to `size` pixels and slightly turned."""
    picture = Image.fromarray((digits()[0][index] * 15.9).astype(np.uint8))
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    picture = picture.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=float) / 255


def _raster(strokes: list[tuple], scale: float, angle: float, width: float) -> np.ndarray:
    """Draw strokes given in [-1, 1]² (('line', points) or ('fill', points)) to a (32, 32) coverage map."""
    side = SIZE * _OVERSAMPLE
    sheet = Image.new("L", (side, side))
    pen = ImageDraw.Draw(sheet)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    for kind, points in strokes:
        placed = [
            (side / 2 + (x * cos - y * sin) * _OVERSAMPLE, side / 2 + (x * sin + y * cos) * _OVERSAMPLE)
            for x, y in points
        ]
        if kind == "fill":
            pen.polygon(placed, fill=255)
        else:
            pen.line(placed, fill=255, width=max(1, round(width * _OVERSAMPLE)), joint="curve")
    return np.asarray(sheet.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=float) / 255


def _arc(centre: tuple[float, float], radius: float, start: float, stop: float, steps: int = 20) -> list:
    angles = [start + (stop - start) * i / steps for i in range(steps + 1)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _shape_strokes(shape: str) -> list[tuple]:
    turn = 2 * math.pi
    outlines = {
        "circle": ("fill", _arc((0, 0), 0.85, 0, turn)),
        "square": ("fill", [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]),
        "triangle": ("fill", [(0, -0.9), (0.9, 0.75), (-0.9, 0.75)]),
        "star": (
            "fill",
            [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate([1.0, 0.42] * 5)],
        ),
        "ring": ("line", _arc((0, 0), 0.75, 0, turn)),
        "moon": ("fill", _arc((0, 0), 0.9, 0.9, turn - 0.9) + _arc((0.45, 0), 0.72, turn - 1.35, 1.35)),
    }
    if shape == "cross":
        return [("line", [(-0.75, -0.75), (0.75, 0.75)]), ("line", [(-0.75, 0.75), (0.75, -0.75)])]
    if shape == "arrow":
        return [
            ("line", [(-0.9, 0), (0.9, 0)]),
            ("line", [(0.25, -0.65), (0.9, 0), (0.25, 0.65)]),
        ]
    return [outlines[shape]]


def _draw(strokes: list[tuple], colour: str, rng: np.random.Generator, turn: float) -> Image.Image:
    alpha = _raster(strokes, rng.uniform(9.5, 12.5), rng.uniform(-turn, turn), rng.uniform(2.2, 3.0))
    rows, columns = alpha.max(1) > 0, alpha.max(0) > 0
    alpha = alpha[rows][:, columns]
    image = canvas(rng)
    paste(image, alpha, colour, tuple(SIZE / 2 + rng.uniform(-4, 4, size=2)), rng)
    return finish(image, rng)


def draw_shape(shape: str, colour: str, rng: np.random.Generator) -> Image.Image:
    """One of SHAPES, varied in size, angle and place."""
    return _draw(_shape_strokes(shape), colour, rng, turn=0.3)


@lru_cache(maxsize=512)
def glyph(seed: int) -> tuple[tuple, ...]:
    """Strokes of the glyph with this number: three to four lines and arcs on a 3 x 3 grid."""
    rng = np.random.default_rng((7919, seed))
    grid = [(-0.85, 0.0, 0.85)[i] for i in range(3)]
    strokes = []
    for _ in range(int(rng.integers(3, 5))):
        if rng.random() < 0.3:
            centre = tuple(rng.choice(grid, size=2) * 0.5)
            start = float(rng.integers(4)) * math.pi / 2
            strokes.append(("line", _arc(centre, 0.5, start, start + rng.choice([1.0, 1.5, 2.0]) * math.pi)))
        else:
            first = rng.choice(9)
            second = (first + 1 + rng.choice(8)) % 9
            ends = [(float(grid[p % 3]), float(grid[p // 3])) for p in (first, second)]
            strokes.append(("line", ends))
    return tuple(strokes)


def draw_glyph(seed: int, colour: str, rng: np.random.Generator) -> Image.Image:
    """Glyph number `seed`, varied in size, angle, place, stroke width and noise."""
    return _draw(list(glyph(seed)), colour, rng, turn=0.3)


def draw_digits(indices: list[int], colours: list[str], layout: str, rng: np.random.Generator) -> Image.Image:
    """Real digits on one picture. layout: single | pair (left, right) | corners (up to four)."""
    image = canvas(rng)
    if layout == "single":
        centres, size = [(16.0, 16.0)], (19, 24)
    elif layout == "pair":
        centres, size = [(8.0, 16.0), (24.0, 16.0)], (15, 17)
    else:
        centres, size = [(8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0)], (13, 15)
        centres = [centres[i] for i in rng.permutation(4)[: len(indices)]]
    for index, colour, (x, y) in zip(indices, colours, centres):
        jitter = rng.uniform(-3, 3, size=2) if layout == "single" else rng.uniform(-1, 1, size=2)
        if layout == "pair":
            jitter[1] = rng.uniform(-5, 5)
        alpha = digit_alpha(index, int(rng.integers(*size)), rng)
        paste(image, alpha, colour, (x + jitter[0], y + jitter[1]), rng)
    return finish(image, rng)
