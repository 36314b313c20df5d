"""Search in a local folder or data set: by CLIP embeddings, or by the words of names and captions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_write
from kore.augmentation.cache import digest
from kore.augmentation.images.catalog import open_catalog
from kore.augmentation.images.similarity import Clip
from kore.augmentation.images.words import WordIndex, printable
from kore.augmentation.types import Candidate
from kore.errors import DataError

if TYPE_CHECKING:
    import numpy

_SAVE_EVERY = 60.0
"""Seconds between two writes of an index that grows: all that a kill may lose."""
_BLOCK = 64


class FolderSource:
    """Images of a folder or data set by text.

    With a CLIP model the query's embedding is compared with those of all images, so there is always a nearest one.
    Without a model file names and captions have to share a word with the query. ``method`` says which of the two it is,
    ``skipped`` maps the places of images that could not be read to the reasons.

    Args:
        path: A folder of images, a data set of ``save_to_disk``, or parquet.
        scratch: A folder for the index and for images taken out of a data set.
        clip: The model, or None for words.

    Raises:
        DataError: There is no image.
    """

    def __init__(self, path: Path | str, scratch: Path | str, clip: Clip | None = None) -> None:
        self._catalog = open_catalog(Path(path), Path(scratch) / "images")
        self._clip, self._scratch = clip, Path(scratch)
        self._lock = threading.Lock()
        self._matrix: numpy.ndarray | None = None
        self._readable: list[int] = []
        self._content = ""
        self._entries = digest([vars(entry) for entry in self._catalog.entries])
        self._words = None if clip else WordIndex([entry.words for entry in self._catalog.entries])
        self.method = "clip" if clip else "words"
        self.skipped: dict[str, str] = {}

    local = True
    """Its results are places on this machine, found without asking anybody: they need no cache."""

    def __len__(self) -> int:
        return len(self._catalog.entries)

    def identity(self) -> Mapping[str, Any]:
        identity = {"kind": "folder", "method": self.method, "entries": self._entries}
        if self._clip is None:
            return identity
        self._index()
        return {**identity, **self._clip.identity(), "content": self._content}

    def search(self, query: str, count: int) -> Sequence[Candidate]:
        """The best matches first; images that cannot be read are passed over."""
        found: list[Candidate] = []
        for number in self._ranked(query):
            if len(found) == count:
                break
            try:
                found.append(self._catalog.candidate(number))
            except DataError as error:
                self._skip(number, error)
        return found

    def _ranked(self, query: str) -> Iterable[int]:
        if self._words is not None:
            return self._words.search(query)
        assert self._clip is not None
        import numpy

        scores = self._index() @ self._clip.text(query)
        # The last digits depend on the number of threads.
        order = numpy.argsort(-numpy.round(scores, 6), kind="stable")
        return (self._readable[row] for row in order)

    def _skip(self, number: int, error: Exception) -> None:
        self.skipped[printable(self._catalog.entries[number].place)] = printable(str(error))

    def _index(self) -> numpy.ndarray:
        """The embeddings of all readable images, computed once and kept on disk by the images' content."""
        with self._lock:
            if self._matrix is None:
                self._matrix = self._build()
            return self._matrix

    def _build(self) -> numpy.ndarray:
        import numpy

        assert self._clip is not None
        weights = self._clip.identity()["weights"]
        file = self._scratch / f"clip-{weights[:32]}.safetensors"
        known = _load(file)
        shas: list[str | None] = [self._sha256(number) for number in range(len(self))]
        unknown = {sha256: number for number, sha256 in enumerate(shas) if sha256 is not None and sha256 not in known}
        new, saved = list(unknown.items()), time.monotonic()
        for start in range(0, len(new), _BLOCK):
            self._embed(dict(new[start : start + _BLOCK]), known)
            if time.monotonic() - saved > _SAVE_EVERY or start + _BLOCK >= len(new):
                _save(file, known)
                saved = time.monotonic()
        self._readable = [number for number, sha256 in enumerate(shas) if sha256 in known]
        if not self._readable:
            raise DataError(f"none of {len(self)} images can be read; the first: {next(iter(self.skipped.values()))}")
        self._content = digest([shas[number] for number in self._readable])
        return numpy.stack([known[str(shas[number])] for number in self._readable])

    def _sha256(self, number: int) -> str | None:
        try:
            return self._catalog.sha256(number)
        except (DataError, OSError) as error:
            self._skip(number, error)
            return None

    def _embed(self, numbers: Mapping[str, int], known: dict[str, numpy.ndarray]) -> None:
        """Add the embeddings of some images, in batches unless one of them cannot be read."""
        assert self._clip is not None
        paths = {sha256: self._catalog.candidate(number).path for sha256, number in numbers.items()}
        try:
            known.update(zip(paths, self._clip.images([path for path in paths.values() if path], list(paths))))
            return
        except DataError as error:
            if len(numbers) == 1:
                return self._skip(next(iter(numbers.values())), error)
        for sha256, number in numbers.items():
            self._embed({sha256: number}, known)


def _load(file: Path) -> dict[str, numpy.ndarray]:
    """The embeddings of an index file by image sha256; none where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file) if file.is_file() else {}
    except (OSError, ValueError, SafetensorError):
        return {}


def _save(file: Path, known: Mapping[str, numpy.ndarray]) -> None:
    import numpy
    from safetensors.numpy import save

    atomic_write(file, save({name: numpy.ascontiguousarray(row) for name, row in sorted(known.items())}))
