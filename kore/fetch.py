"""The only path by which KORE opens images: inside the data root, capped in bytes and pixels, as RGB.

Nothing here uses the network.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from kore.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_IMAGE_PIXELS = 100_000_000

_EXIF_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)


def resolve_image(name: str, root: str | os.PathLike[str]) -> Path:
    """The file that ``name`` means below ``root``, symbolic links followed.

    Raises:
        DataError: ``name`` is a URL, is not a file, or lies outside ``root`` after links are followed.
    """
    if "://" in name or name.startswith("data:"):
        raise DataError(f"image {name[:80]!r} is a URL; expected a file below {root}: save it there first")
    base = Path(root).resolve()
    try:
        path = (base / name).resolve()
        outside = not path.is_relative_to(base)
        found = not outside and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"image {name[:80]!r} is not a usable file name ({error})") from None
    if outside:
        raise DataError(f"image {name!r} lies outside the image root {base}; move it inside or change image_root")
    if not found:
        raise DataError(f"image not found: {path}")
    return path


def _open(path: Path, max_bytes: int, max_pixels: int) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(f"image {path} has {size} bytes; the limit is {max_bytes}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image {path} cannot be read ({type(error).__name__}: {error})") from None
    if image.width * image.height > max_pixels:
        image.close()
        raise DataError(f"image {path} has {image.width} x {image.height} pixels; the limit is {max_pixels} in all")
    return image


def image_size(
    path: str | os.PathLike[str], max_bytes: int = MAX_IMAGE_BYTES, max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[int, int]:
    """(height, width) of the image as :func:`open_image` returns it, read from its header alone.

    Raises:
        DataError: The file is missing, not an image, or over a limit.
    """
    from PIL import Image

    with _open(Path(path), max_bytes, max_pixels) as image:
        # The method of the base class: that of PNG files decodes the whole image to look behind it.
        swapped = Image.Image.getexif(image).get(_EXIF_ORIENTATION) in _SWAPS_SIDES
        return (image.width, image.height) if swapped else (image.height, image.width)


def open_image(
    path: str | os.PathLike[str], max_bytes: int = MAX_IMAGE_BYTES, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Decode an image to RGB, turned upright by its EXIF orientation.

    Raises:
        DataError: The file is missing, not an image, truncated, or over a limit.
    """
    from PIL import ImageOps

    with _open(Path(path), max_bytes, max_pixels) as image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise DataError(f"image {path} cannot be decoded ({type(error).__name__}: {error})") from None
