"""From a search query to the images that are kept: search, fetch, choose; what is done is never done again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kore.artifacts import file_sha256
from kore.augmentation.cache import Cache
from kore.augmentation.images.choose import Similarity, choose
from kore.augmentation.images.store import ImageStore, from_record, to_record
from kore.augmentation.types import Candidate, ImageSource, StoredImage
from kore.errors import ConfigError, DataError, KoreError, Unavailable
from kore.fetch import Answered, Unfit, redact


@dataclass(frozen=True, order=True)
class Problem:
    """An image that could not be had: what was searched, where it is, and why."""

    query: str
    place: str
    reason: str


class Images:
    """Finds images for queries. Several threads may use it at once.

    Args:
        source: The search, or None: then nothing is ever found.
        store: Where images are kept.
        cache: Where results of searches and downloads are kept; lasting failures too, so that a second run does not ask
            again.
        similarity: The measure that ranks what was found; without one the order of the search stands.
        results: How many results of a search are fetched.
        keep: How many of them are kept.
    """

    def __init__(
        self,
        source: ImageSource | None,
        store: ImageStore,
        cache: Cache,
        similarity: Similarity | None = None,
        results: int = 5,
        keep: int = 2,
    ) -> None:
        self.source, self.store, self.cache, self.similarity = source, store, cache, similarity
        self.results, self.keep = results, keep
        self._problems: set[Problem] = set()
        self._lock = threading.Lock()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Images that could not be had, in an order that does not depend on threads; those that no search could look at
        are among them, with an empty query."""
        skipped = dict(getattr(self.source, "skipped", {}))
        with self._lock:
            return tuple(sorted({*self._problems, *(Problem("", place, why) for place, why in skipped.items())}))

    def find(
        self, query: str, original: StoredImage | Path | None = None, keep: int | None = None
    ) -> list[tuple[StoredImage, float | None]]:
        """The best images for a query, each with its similarity to the original, at most ``keep``, maybe none.

        Failures of single images go to :attr:`problems`.

        Raises:
            Unavailable: The search fails in passing; or no image is left and one of them failed in passing.
            ConfigError: The search refuses the key, or the store cannot be written.
            KoreError: The search fails lastingly, or the original cannot be read.
        """
        if self.source is None:
            return []
        stored, passing = [], None
        for candidate in self._search(query):
            try:
                stored.append(self._fetch(candidate))
            except ConfigError:
                raise
            except KoreError as error:
                if isinstance(error, Unavailable):
                    passing = passing or error
                place = redact(candidate.url) if candidate.url else candidate.page
                with self._lock:
                    self._problems.add(Problem(query, place, str(error)))
        chosen = choose(original, stored, self.similarity, self.keep if keep is None else keep)
        if not chosen and passing:
            raise Unavailable(f"images for {query!r}: {passing}")
        return chosen

    def _search(self, query: str) -> Sequence[Candidate]:
        assert self.source is not None
        if getattr(self.source, "local", False):
            return list(self.source.search(query, self.results))
        key = {"source": dict(self.source.identity()), "query": query, "count": self.results}
        if (found := self.cache.get("search", key)) is not None:
            try:
                return [from_record(record) for record in found]
            except (TypeError, AttributeError):
                pass  # a record of another version: search again
        candidates = list(self.source.search(query, self.results))[: self.results]
        self.cache.put("search", key, [to_record(candidate) for candidate in candidates])
        return candidates

    def _fetch(self, candidate: Candidate) -> StoredImage:
        key: dict[str, Any] = {"store": self.store.identity()}
        if candidate.url:
            key["url"] = candidate.url
        elif candidate.path is not None and candidate.path.is_file():
            key["sha256"] = file_sha256(candidate.path)
        else:
            return self.store.fetch(candidate)
        entry = self.cache.get("image", key)
        if isinstance(entry, dict):
            if "error" in entry:
                raise KoreError(entry["error"])
            if stored := self.store.find(str(entry.get("sha256")), candidate):
                return stored
        try:
            stored = self.store.fetch(candidate)
        except KoreError as error:
            if candidate.url and _lasting(error):
                self.cache.put("image", key, {"error": str(error)})
            raise
        self.cache.put("image", key, {"sha256": stored.sha256})
        return stored


def _lasting(error: KoreError) -> bool:
    """Whether the same image fails in the same way next time, whatever the network and the list of hosts are then."""
    gone = isinstance(error, Answered) and error.status in (404, 410)
    return gone or isinstance(error, Unfit | DataError)
