"""Changes of an image: such as leave visible what is shown, and such as do not care."""

from __future__ import annotations

import random

from PIL import Image, ImageEnhance, ImageOps, ImageStat

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def altered(image: Image.Image, aware: bool, rng: random.Random) -> Image.Image:
    """A changed copy of an RGB image.

    Args:
        aware: Keep what is shown: light and colour within a fifth, a turn of up to 8 degrees, at least nine tenths of
            each side. Otherwise a crop to between a third and nine tenths of each side, a flip, a turn by any angle,
            and colours up to grey, inverted or of another hue, each of them or not.
    """
    return _mild(image, rng) if aware else _strong(image, rng)


def _mild(image: Image.Image, rng: random.Random) -> Image.Image:
    for enhancer in _ENHANCERS:
        image = enhancer(image).enhance(rng.uniform(0.8, 1.2))
    return _crop(_turn(image, rng.uniform(-8, 8)), 0.9, 1.0, rng)


def _strong(image: Image.Image, rng: random.Random) -> Image.Image:
    image = _crop(image, 1 / 3, 0.9, rng)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.3:
        image = ImageOps.flip(image)
    if rng.random() < 0.7:
        image = _turn(image, rng.uniform(-180, 180))
    colour = rng.randrange(4)
    if colour == 0:
        image = ImageOps.grayscale(image).convert("RGB")
    elif colour == 1:
        image = ImageOps.invert(image)
    elif colour == 2:
        image = _hue(image, rng.randrange(32, 224))
    for enhancer in _ENHANCERS:
        image = enhancer(image).enhance(rng.uniform(0.4, 1.8))
    return image


def _turn(image: Image.Image, angle: float) -> Image.Image:
    """Turned within its frame, the corners filled with the mean colour."""
    red, green, blue = (round(value) for value in ImageStat.Stat(image).mean)
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(red, green, blue))


def _crop(image: Image.Image, least: float, most: float, rng: random.Random) -> Image.Image:
    """A random part, each side a share of the image's between ``least`` and ``most``."""
    width, height = (max(1, round(side * rng.uniform(least, most))) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _hue(image: Image.Image, by: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point([(h + by) % 256 for h in range(256)]), saturation, value)).convert("RGB")
