"""Which of the found images are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kore.augmentation.types import StoredImage
from kore.fetch import open_image

# At this size copies of a picture at JPEG quality 30 to 100 and 0.5 to 2.5 times its size were measured to differ by at
# most 2.7 levels on average and 20 anywhere; a square of a tenth of the sides painted over differs by 56 at one place.
_SIDE = 16
_MEAN, _MOST = 3.0, 30.0
_ASPECT = 0.02


class Similarity(Protocol):
    """How alike pictures are in content. Several threads call it at once."""

    def similarities(self, original: Path, others: Sequence[Path]) -> list[float]:
        """Cosine similarity of each of the others to the original, at most 1."""


@dataclass(frozen=True)
class Thumbprint:
    """A picture reduced so far that its copies in other sizes and qualities look the same."""

    aspect: float
    thumbnail: Any

    def same(self, other: Thumbprint) -> bool:
        """Whether both are the same picture, maybe resized or compressed again.

        Reduced to 16 x 16 pixels they differ by at most 3 levels of 255 on average and 30 anywhere, and their
        proportions by at most 2 %.
        """
        if abs(self.aspect - other.aspect) > _ASPECT * self.aspect:
            return False
        difference = abs(self.thumbnail - other.thumbnail)
        return bool(difference.mean() <= _MEAN and difference.max() <= _MOST)


def thumbprint(path: Path) -> Thumbprint:
    """The thumbprint of an image file. Raises DataError when it cannot be read."""
    import numpy
    from PIL import Image

    image = open_image(path)
    small = image.resize(
        (_SIDE, _SIDE), Image.Resampling.BOX if min(image.size) >= _SIDE else Image.Resampling.BILINEAR
    )
    return Thumbprint(image.width / image.height, numpy.asarray(small, dtype=numpy.float32))


def choose(
    original: StoredImage | Path | None, stored: Sequence[StoredImage], similarity: Similarity | None, keep: int = 2
) -> list[tuple[StoredImage, float | None]]:
    """The best of the found images, each with its similarity to the original.

    A picture identical to the original, or to a better result, is left out: the same file, or the same picture resized
    or compressed again. Without a similarity measure or an original the order of the search stands, and the similarity
    is None.

    Args:
        original: The item's own image, or None.
        stored: What the search found, the best first.
        similarity: The measure.
        keep: How many to keep at most.

    Raises:
        DataError: The original cannot be read.
    """
    path = original.path if isinstance(original, StoredImage) else original
    seen = [] if path is None else [thumbprint(path)]
    shas = {original.sha256} if isinstance(original, StoredImage) else set()
    distinct: list[StoredImage] = []
    for image in stored:
        if image.sha256 in shas:
            continue
        print_ = thumbprint(image.path)
        if any(print_.same(other) for other in seen):
            continue
        shas.add(image.sha256)
        seen.append(print_)
        distinct.append(image)
    if path is None or similarity is None or not distinct:
        return [(image, None) for image in distinct[:keep]]
    values = [round(float(value), 6) for value in similarity.similarities(path, [image.path for image in distinct])]
    order = sorted(range(len(distinct)), key=lambda index: (-values[index], index))
    return [(distinct[index], values[index]) for index in order[:keep]]
