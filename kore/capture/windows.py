"""Capture in several passes over the data, each over a window of layers that fits into memory."""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kore.artifacts import MANIFEST
from kore.capture.engine import Engine
from kore.capture.plan import MemoryPlan
from kore.covariance import CovarianceSet
from kore.errors import KoreError
from kore.sizes import format_bytes

Batches = Iterable[Mapping[str, Any]]


def first_batch(batches: Batches) -> tuple[bool, Mapping[str, Any] | None, Batches]:
    """Whether the batches can be iterated again; the first one, None if there is none; and all of them, it included."""
    iterator = iter(batches)
    first = next(iterator, None)
    if iterator is not batches:
        return True, first, batches
    return False, first, iterator if first is None else itertools.chain([first], iterator)


def capture_in_windows(engine: Engine, plan: MemoryPlan, batches: Batches, checkpoint: Path | None) -> CovarianceSet:
    """One pass for each window of the plan; what is finished lies on disk, where the result reads it.

    That is in the checkpoint's folder or, without one, in a temporary folder that lives as long as the result.

    Raises:
        KoreError: The disk is too small, or the passes do not see the same batches.
    """
    if checkpoint is not None and (checkpoint / MANIFEST).is_file():
        raise KoreError(
            f"{checkpoint}: this checkpoint was written by a capture in one pass, this one takes {len(plan.windows)}; "
            "delete it to start again, or allow more memory"
        )
    folder = Path(tempfile.mkdtemp(prefix="kore-capture-")) if checkpoint is None else checkpoint / "result"
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[CovarianceSet] = []
    try:
        with engine.processes.fail_together():
            _check_disk(folder, plan.on_disk())
        passes = _Passes(batches)
        for number, window in enumerate(plan.windows):
            names = [module for index in window for module in plan.groups[index].modules]
            part = engine.capture(
                passes,
                names,
                plan.storage,
                None if checkpoint is None else checkpoint / f"window-{number:03d}",
                planned=True,
                label=f"{engine.result_type.kind} {number + 1}/{len(plan.windows)}",
            )
            with engine.processes.fail_together():
                passes.compare()
                part.save(folder / f"window-{number:03d}")
            parts.append(engine.result_type.load(folder / f"window-{number:03d}"))
            del part
        result = _join(parts)
    except BaseException:
        if checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if checkpoint is None:
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _join(parts: list[CovarianceSet]) -> CovarianceSet:
    first = parts[0]
    matrices = {group.name: functools.partial(part.__getitem__, group.name) for part in parts for group in part.groups}
    groups = [group for part in parts for group in part.groups]
    return type(first)(matrices, groups, first.fingerprint, first.normalize, first.selection, first.dtype)


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise KoreError(
            f"{folder}: the finished passes need {format_bytes(need)} on disk, {format_bytes(free)} are free; "
            "name a checkpoint folder on a larger disk, or allow more memory"
        )


class _Passes:
    """Batches that are iterated several times: counts what each pass gives."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._counts: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        number = tokens = 0
        for batch in self._batches:
            number += 1
            tokens += _tokens(batch)
            yield batch
        self._counts.append((number, tokens))

    def compare(self) -> None:
        """Raise KoreError unless all passes gave as many batches with as many tokens."""
        first, last = self._counts[0], self._counts[-1]
        if first != last:
            raise KoreError(
                f"batches: pass 1 gave {first[0]} batches with {first[1]} tokens, pass {len(self._counts)} gave "
                f"{last[0]} with {last[1]}; every pass must give the same data"
            )


def _tokens(batch: Any) -> int:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return int(mask.sum()) if isinstance(mask, torch.Tensor) and mask.device.type == "cpu" else 0
