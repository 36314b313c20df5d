"""Images as they enter a data set: checked, upright, without metadata, named by their content."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.augmentation.images.words import printable
from kore.augmentation.types import Candidate, StoredImage
from kore.errors import ConfigError, DataError, KoreError
from kore.fetch import DecodedImage, Downloader, decode_image, redact

JPEG_QUALITY = 90
LOSSLESS_PIXELS = 512 * 512
_REMEMBERED = 1024
# Temporary files are named after the process, so its threads take turns, whatever store they use.
_LOCK = threading.Lock()


def encode(image: DecodedImage, max_side: int) -> tuple[bytes, str, int, int]:
    """The stored form of an image: its bytes, their suffix, width and height.

    PNG and GIF images stay without loss when they are drawings (a palette or two colours) or have at most 512 x 512
    pixels; all others become JPEG of quality 90. Images with a longer side than ``max_side`` are reduced first. The
    same pixels give the same bytes with the same version of Pillow.
    """
    from PIL import Image

    pixels, lossless = image.pixels, image.kind in ("PNG", "GIF")
    if max(pixels.size) > max_side:
        pixels = pixels.copy()
        pixels.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    lossless = lossless and (image.flat or pixels.width * pixels.height <= LOSSLESS_PIXELS)
    buffer = io.BytesIO()
    if lossless:
        pixels.save(buffer, "PNG", optimize=True)
    else:
        pixels.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), "png" if lossless else "jpg", pixels.width, pixels.height


class ImageStore:
    """A folder of images ``<sha256>.jpg`` or ``.png``, each with a ``<sha256>.json`` that says where it came from.

    The sha256 is that of the stored bytes, so the same picture from two places is there once, with both places in its
    side-car. Files appear whole or not at all; after a loss of power :meth:`find` tells those that are damaged, and
    :meth:`fetch` writes them again. Several threads may use a store at once, and several processes, of which the last
    one to find a picture may leave a place that another one found out of the side-car.

    Args:
        folder: Where it lies; made when the first image comes.
        download: How candidates with a URL are fetched; None keeps the network off.
        max_bytes: The largest file to open.
        max_pixels: The largest area to decode.
        max_side: Larger images are reduced to this.
    """

    def __init__(
        self,
        folder: Path | str,
        download: Downloader | None = None,
        *,
        max_bytes: int = 32 * 1024 * 1024,
        max_pixels: int = 50_000_000,
        max_side: int = 2048,
    ) -> None:
        self.folder = Path(folder)
        self.download = download
        self.max_bytes, self.max_pixels, self.max_side = max_bytes, max_pixels, max_side
        self._kept: dict[tuple[str, int, int], StoredImage] = {}

    def identity(self) -> dict[str, Any]:
        """What the stored form of an image depends on beside the image."""
        import PIL

        caps = {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels, "max_side": self.max_side}
        return {"jpeg_quality": JPEG_QUALITY, "pillow": PIL.__version__, **caps}

    def fetch(self, candidate: Candidate) -> StoredImage:
        """Download or copy an image into the store.

        Raises:
            Unavailable: Its server fails in passing.
            ConfigError: The store cannot be written.
            KoreError: It cannot be fetched, or is not an image within the caps; the network is off.
        """
        if candidate.path is not None:
            path = Path(candidate.path)
            name = str(path)
            try:
                if path.stat().st_size > self.max_bytes:
                    raise DataError(f"image {path} has {path.stat().st_size} bytes; the limit is {self.max_bytes}")
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"image {path} cannot be read ({error.strerror})") from None
        elif candidate.url is not None:
            if self.download is None:
                raise KoreError(f"{redact(candidate.url)}: the network is off; choose an image search to switch it on")
            name, data = redact(candidate.url), self.download.image(candidate.url).body
        else:
            raise DataError("an image candidate needs a url or a path")
        return self._store(candidate, data, name)

    def keep(self, path: Path | str, title: str = "") -> StoredImage:
        """Copy a local image, such as an item's original, into the store. Raises as :meth:`fetch`."""
        path = Path(path)
        candidate = Candidate(path=path, page=path.name, title=title)
        try:
            state = path.stat()
        except OSError:
            return self.fetch(candidate)
        key = (str(path), state.st_size, state.st_mtime_ns)
        stored = self._kept.get(key)
        if stored is None or stored.candidate != candidate:
            stored = self.fetch(candidate)
            if len(self._kept) >= _REMEMBERED:
                self._kept.clear()
            self._kept[key] = stored
        return stored

    def find(self, sha256: str, candidate: Candidate) -> StoredImage | None:
        """The stored image of this content, or None where it or its side-car is missing or damaged."""
        try:
            record = json.loads((self.folder / f"{sha256}.json").read_text(encoding="utf-8"))
            path = self.folder / record["file"]
            if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                return None
            return StoredImage(sha256, path, int(record["width"]), int(record["height"]), candidate)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _store(self, candidate: Candidate, data: bytes, name: str) -> StoredImage:
        decoded = decode_image(data, name, self.max_bytes, self.max_pixels)
        content, suffix, width, height = encode(decoded, self.max_side)
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.folder / f"{sha256}.{suffix}"
        fetched = {"width": decoded.pixels.width, "height": decoded.pixels.height, "format": decoded.kind}
        try:
            with _LOCK:
                # A file with other content was damaged by something other than this program: it is written again.
                if not path.is_file() or path.read_bytes() != content:
                    atomic_write(path, content, durable=False)
                self._record(path, sha256, width, height, {**describe(candidate), **fetched})
        except OSError as error:
            raise ConfigError(
                f"{path}: the image cannot be stored ({error.strerror or type(error).__name__}); free some space, or "
                "choose another folder"
            ) from error
        return StoredImage(sha256, path, width, height, candidate)

    def _record(self, path: Path, sha256: str, width: int, height: int, source: dict[str, Any]) -> None:
        sidecar = path.with_suffix(".json")
        try:
            sources = json.loads(sidecar.read_text(encoding="utf-8"))["sources"]
        except (OSError, ValueError, KeyError, TypeError):
            sources = []
        if source in sources:
            return
        # Sorted, so that the side-car does not tell which thread was first.
        sources = sorted([*sources, source], key=lambda entry: json.dumps(entry, sort_keys=True))
        record = {"sha256": sha256, "file": path.name, "width": width, "height": height, "sources": sources}
        atomic_write(sidecar, json.dumps(record, indent=2, ensure_ascii=False) + "\n", durable=False)


def describe(candidate: Candidate) -> dict[str, str]:
    """Where a candidate comes from and whose it is, for files; of a local one the place, not the path."""
    # Names of files and fields of servers may hold what UTF-8 cannot.
    place = {"url": candidate.url} if candidate.url else {"file": candidate.page or Path(str(candidate.path)).name}
    about = {name: getattr(candidate, name) for name in ("page", "title", "licence", "author")}
    return {name: printable(value) for name, value in {**place, **about}.items()}


def to_record(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON, for the cache."""
    return {**vars(candidate), "path": str(candidate.path) if candidate.path else None}


def from_record(record: dict[str, Any]) -> Candidate:
    """The candidate of :func:`to_record`. Raises TypeError for a record of another form."""
    candidate = Candidate(**record)
    return replace(candidate, path=Path(candidate.path)) if candidate.path else candidate
