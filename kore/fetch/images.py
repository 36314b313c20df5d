"""The only path by which KORE opens images: inside the data root, capped in bytes and pixels, as RGB."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kore.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_IMAGE_PIXELS = 100_000_000

IMAGE_HEAD = 256
"""How many first bytes tell what an image is, or what is there in its place."""

_EXIF_ORIENTATION = 0x0112
# Of Image.Transpose, by orientation.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_SWAPS_SIDES = (5, 6, 7, 8)
# Drawings such as EPS are left out: Pillow has them drawn by a program that runs what they say.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# What Pillow raises for malformed files of these formats, found by changing bytes of whole ones.
_MALFORMED = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, IndexError),
    *(AttributeError, ArithmeticError, struct.error, zlib.error),
)


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
    from PIL import Image

    Image.init()
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(f"image {path} has {size} bytes; the limit is {max_bytes}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])
    except (*_MALFORMED, Image.DecompressionBombError) as error:
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
    with _open(Path(path), max_bytes, max_pixels) as image:
        swapped = _orientation(image) in _SWAPS_SIDES
        return (image.width, image.height) if swapped else (image.height, image.width)


def open_image(
    path: str | os.PathLike[str], max_bytes: int = MAX_IMAGE_BYTES, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Decode an image to RGB, turned upright by its EXIF orientation.

    Raises:
        DataError: The file is missing, not an image, truncated, or over a limit.
    """
    with _open(Path(path), max_bytes, max_pixels) as image:
        try:
            pixels = _turned(image.convert("RGB"), _orientation(image))
        except _MALFORMED as error:
            raise DataError(f"image {path} cannot be decoded ({type(error).__name__}: {error})") from None
    pixels.info.clear()  # its orientation does not hold any longer
    return pixels


def image_kind(head: bytes) -> str | None:
    """``"JPEG"``, ``"PNG"``, ``"WEBP"`` or ``"GIF"`` by a file's first bytes, None for anything else."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return "GIF" if head.startswith((b"GIF87a", b"GIF89a")) else None


@dataclass(frozen=True)
class DecodedImage:
    """Pixels and nothing else: RGB, upright, without metadata.

    Attributes:
        pixels: The image.
        kind: The format it came in.
        flat: It had a palette or two colours only, as drawings have.
    """

    pixels: Image.Image
    kind: str
    flat: bool


def decode_image(
    data: bytes, name: str, max_bytes: int = MAX_IMAGE_BYTES, max_pixels: int = MAX_IMAGE_PIXELS
) -> DecodedImage:
    """Decode a JPEG, PNG, WebP or GIF image that nobody has looked at before.

    The first picture of an animation is taken, the orientation of its EXIF applied, transparency laid on white, and
    16-bit greys brought to 8 bits.

    Args:
        data: The whole file.
        name: What to call it in messages.
        max_bytes: The largest file.
        max_pixels: The largest area, told by the header before anything is decoded.

    Raises:
        DataError: It is not such an image, truncated, corrupt, or over a limit.
    """
    from PIL import Image

    if len(data) > max_bytes:
        raise DataError(f"image {name} has {len(data)} bytes; the limit is {max_bytes}")
    kind = image_kind(data[:IMAGE_HEAD])
    if kind is None:
        raise DataError(f"image {name}: expected JPEG, PNG, WebP or GIF")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=(kind,)) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height}"
                    raise DataError(f"image {name} has {size} pixels; the limit is {max_pixels} in all")
                orientation = _orientation(image)
                image.load()
                return DecodedImage(_turned(_plain(image), orientation), kind, image.mode in ("1", "P"))
    except (Image.DecompressionBombError, MemoryError) as error:
        raise DataError(f"image {name} is too large ({error})") from None
    except _MALFORMED as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image {name} cannot be decoded ({type(error).__name__}: {error})") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is not decoded yet; an unreadable EXIF block says nothing about it."""
    from PIL import Image

    with contextlib.suppress(*_MALFORMED):
        # The method of the base class: that of PNG files decodes the whole image to look behind it.
        return int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))
    return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(Image.Transpose(turn))


def _plain(image: Image.Image) -> Image.Image:
    """RGB pixels in a new image that carries no metadata."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        import numpy

        image = Image.fromarray((numpy.asarray(image).clip(0, 65535) / 257).round().astype("uint8"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    plain = Image.new("RGB", image.size)
    plain.paste(image.convert("RGB"))
    return plain
