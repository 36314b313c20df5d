"""What came of an item, to and from JSON, and the store of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kore.artifacts import file_sha256
from kore.augmentation.cache import Cache
from kore.augmentation.types import Candidate, Failure, ItemResult, KnowledgeItem, Sample, StoredImage

_KIND = "item"
_VERSION = 1
"""Counted up when results made before can no longer be taken over."""


class Results:
    """The results of single items, kept under all that they depend on.

    Args:
        cache: Keeps them.
        images: The folder of the images; paths are kept relative to it.
        run: What the results of all items depend on: texts, generator, image source, seed, tasks.
    """

    def __init__(self, cache: Cache, images: Path, run: Mapping[str, Any]) -> None:
        self._cache, self._images = cache, images
        self.run = _digest({"version": _VERSION, **run})

    def key(self, item: KnowledgeItem) -> str:
        """A hash of the item's content, its image included, and of the run."""
        content = {
            "run": self.run,
            "id": item.id,
            "category": item.category,
            "type": item.type,
            "title": item.title,
            "text": item.text,
            "facts": dict(item.facts),
            "image": None if item.image is None else file_sha256(item.image),
        }
        return _digest(content)

    def get(self, key: str, item: KnowledgeItem) -> ItemResult | None:
        """What was put there, or None where there is nothing, it cannot be read, or an image of it is gone."""
        value = self._cache.get(_KIND, {"key": key})
        if not isinstance(value, Mapping):
            return None
        try:
            samples = tuple(self._sample(row, item) for row in value["samples"])
            failures = tuple(Failure(item.id, row["task"], row["reason"], row["passing"]) for row in value["failures"])
        except (KeyError, TypeError, ValueError):
            return None
        if not all(sample.image is None or sample.image.path.is_file() for sample in samples):
            return None
        return ItemResult(item, samples, failures)

    def done(self, key: str, item: KnowledgeItem) -> bool:
        """Whether there is a result that another run would not better."""
        result = self.get(key, item)
        return result is not None and not any(failure.passing for failure in result.failures)

    def put(self, key: str, result: ItemResult) -> None:
        """Keep a result in place of an earlier one; it appears whole or not at all."""
        failures = [
            {"task": failure.task, "reason": failure.reason, "passing": failure.passing} for failure in result.failures
        ]
        value = {"samples": [self._row(sample) for sample in result.samples], "failures": failures}
        self._cache.put(_KIND, {"key": key}, value, replace=True)

    def _row(self, sample: Sample) -> dict[str, Any]:
        return {
            "id": sample.id,
            "task": sample.task,
            "turns": [list(turn) for turn in sample.turns],
            "image": None if sample.image is None else self._image_row(sample.image),
            "similarity": sample.similarity,
        }

    def _image_row(self, image: StoredImage) -> dict[str, Any]:
        candidate = image.candidate
        return {
            "sha256": image.sha256,
            "file": image.path.relative_to(self._images).as_posix(),
            "width": image.width,
            "height": image.height,
            "candidate": {**vars(candidate), "path": None if candidate.path is None else str(candidate.path)},
        }

    def _sample(self, row: Mapping[str, Any], item: KnowledgeItem) -> Sample:
        turns = tuple((question, answer) for question, answer in row["turns"])
        image = None if row["image"] is None else self._image(row["image"])
        return Sample(row["id"], item.id, row["task"], turns, image, row["similarity"])

    def _image(self, row: Mapping[str, Any]) -> StoredImage:
        found = dict(row["candidate"])
        if found["path"] is not None:
            found["path"] = Path(found["path"])
        path = self._images / row["file"]
        return StoredImage(row["sha256"], path, row["width"], row["height"], Candidate(**found))


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
