"""The augmentation of a knowledge file: items in threads, each kept when it is done, then the files in item order."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import MANIFEST, atomic_write, write_manifest
from kore.augmentation.config import AugmentConfig
from kore.augmentation.export import FAILURES, IMAGES, Tally, write_outputs
from kore.augmentation.guard import Stop
from kore.augmentation.items import Knowledge, load_knowledge
from kore.augmentation.pool import in_threads
from kore.augmentation.types import ItemResult, KnowledgeItem
from kore.augmentation.workshop import Workshop, problems_of
from kore.errors import ArtifactError, DataError, KoreError
from kore.pipeline.stage import only_one

if TYPE_CHECKING:
    from kore.augmentation.types import Generator

KIND = "augmentation"
# What changes no result, or is in the run's identity: texts, generator and images by their content.
_NOT_IN_MANIFEST = {"generator", "images", "limits", "workers", "texts", "image_root", "knowledge"}
CACHE, STATISTICS = "cache", "run.json"


@dataclass(frozen=True)
class Summary:
    """What a run made and what it took.

    Attributes:
        out: The directory of the result.
        items: Items of the result.
        kept: Items that an earlier run had done.
        samples: Conversations by task.
        turns: Questions with answers by task.
        images: Images of the result.
        failures: Failures by task and kind of reason; each is in ``failures.jsonl``.
        passing: How many of these come from a service that did not answer; the next run tries them again.
        bad_rows: Rows that were left out.
        image_problems: Images that could not be had in this run, the samples being made without them.
        accounting: Requests, tokens and cost of this run.
        seconds: What this run took.
        quality: The page of the quality report, where there is one.
    """

    out: Path
    items: int
    kept: int
    samples: dict[str, int]
    turns: dict[str, int]
    images: int
    failures: dict[tuple[str, str], int]
    passing: int
    bad_rows: int
    image_problems: int
    accounting: dict[str, Any]
    seconds: float
    quality: Path | None = None
    data: Path = field(init=False)
    """The conversations in LLaVA's format."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.out / "llava.json")


def read_knowledge(path: Path, config: AugmentConfig, cache: Path) -> Knowledge:
    """The knowledge file, read as the configuration says; images that rows hold go into the cache."""
    return load_knowledge(
        path,
        config.image_root,
        config.on_bad_row,
        columns=config.columns,
        max_items=config.max_items,
        extract=cache / "originals",
    )


def augment(
    knowledge: Knowledge | Path | str,
    config: AugmentConfig | None = None,
    out: Path | str = "augmented",
    *,
    progress: bool = True,
    cache: Path | str | None = None,
    generator: Generator | None = None,
) -> Summary:
    """Make conversations from pieces of knowledge.

    Every item is kept in ``cache`` as soon as it is done, and every answer and image as soon as it is there, so that
    a run that was stopped goes on with the same command and repeats nothing. Items with failures are tried again.
    Same knowledge, configuration and cache give the same files, byte for byte, with any number of workers;
    ``run.json``, which says what this run took, is not among them.

    Args:
        knowledge: A knowledge file, or what :func:`load_knowledge` made of it.
        config: What to make and how.
        out: Directory of the result: ``llava.json``, ``images/``, ``failures.jsonl``, ``images.json``,
            ``manifest.json`` and what ``config.export`` names. Files of an earlier result are replaced.
        progress: Show a progress bar.
        cache: What is kept between runs; by default ``out/cache``. May be shared by several runs and results.
        generator: In place of the one that the configuration names.

    Raises:
        DataError: The knowledge is wrong, or nothing could be made of any of it.
        KoreError: A model, server, key, image source, file or disk cannot be used; what is done is kept.
        ArtifactError: ``out`` holds something else, or another process works there.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is done is kept.
    """
    out = Path(out).absolute()
    config = config or AugmentConfig()
    folder = out / CACHE if cache is None else Path(cache).absolute()
    started = time.perf_counter()
    with _named_troubles(out), _terminable(), only_one(out):
        _check(out)
        items = knowledge if isinstance(knowledge, Knowledge) else read_knowledge(Path(knowledge), config, folder)
        shop = Workshop.open(config, folder, generator)
        _claim(out)
        try:
            keys, kept = _make_all(items, shop, progress)
        except Stop as stop:
            raise stop.reason from stop
        tally, quality = _write(items, keys, shop, out)
        problems = problems_of(shop.images)
        summary = Summary(
            out,
            items=tally.items,
            kept=kept,
            samples=tally.samples,
            turns=tally.turns,
            images=tally.images,
            failures=tally.reasons,
            passing=tally.passing,
            bad_rows=len(items.bad_rows),
            image_problems=len(problems),
            accounting=shop.accounting.summary(),
            seconds=time.perf_counter() - started,
            quality=quality,
        )
        _write_statistics(summary, problems)
    if not tally.samples:
        first = f", the first reason: {tally.first}" if tally.first else ""
        raise DataError(f"nothing could be made of {tally.items} items{first}; {out / FAILURES} lists all")
    return summary


def _make_all(items: Knowledge, shop: Workshop, progress: bool) -> tuple[list[bytes], int]:
    """Make what is not done yet. Returns the key of each item, in order, and how many were done before."""
    from tqdm import tqdm

    keys: list[bytes] = []
    kept = failed = 0
    guarded = shop.guarded()

    with tqdm(total=len(items), unit="item", desc="augment", disable=None if progress else True) as bar:

        def jobs() -> Iterator[tuple[str, KnowledgeItem]]:
            nonlocal kept
            for item in items:
                key = shop.results.key(item)
                keys.append(bytes.fromhex(key))
                if shop.results.done(key, item):
                    kept += 1
                    bar.update()
                else:
                    yield key, item

        def work(job: tuple[str, KnowledgeItem]) -> int:
            key, item = job
            result = guarded.make(item)
            shop.results.put(key, result)
            return len(result.failures)

        with contextlib.closing(in_threads(work, jobs(), shop.config.workers, shop.stop)) as done:
            for _, failures in done:
                failed += failures
                bar.set_postfix_str(_spent(shop.accounting, failed), refresh=False)
                bar.update()
    return keys, kept


def _spent(accounting: Any, failed: int) -> str:
    words = [f"cost {accounting.cost:.2f}"] if accounting.prices.cost(1_000_000, 1_000_000) else []
    tokens = accounting.prompt_tokens + accounting.completion_tokens
    words += [f"{tokens:,} tokens"] if tokens else []
    words += [f"{failed} failures"] if failed else []
    return ", ".join(words)


class _Made:
    """The results in item order; each pass reads them anew."""

    def __init__(self, items: Knowledge, keys: Sequence[bytes], shop: Workshop) -> None:
        self._items, self._keys, self._shop = items, keys, shop

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ItemResult]:
        for item, key in zip(self._items, self._keys):
            result = self._shop.results.get(key.hex(), item)
            if result is None:
                raise ArtifactError(f"item {item.id}: its result is gone from the cache; run the same command again")
            yield result


def _write(items: Knowledge, keys: Sequence[bytes], shop: Workshop, out: Path) -> tuple[Tally, Path | None]:
    """Replace the files of the result; the manifest goes first and comes last."""
    config = shop.config
    made = _Made(items, keys, shop)
    (out / MANIFEST).unlink(missing_ok=True)
    tally, files = write_outputs(
        made,
        out,
        formats=config.export,
        name=config.name,
        openai_images=config.openai_images,
        bad_rows=items.bad_rows,
    )
    page = None
    if config.quality and tally.samples:
        from kore.augmentation.quality import write_quality

        page = write_quality(out, made, config.seed)
        files = itertools.chain(files, [page, page.with_suffix(".json")])
    settings = config.model_dump(mode="json", exclude=_NOT_IN_MANIFEST)
    fields = {
        "made_from": {"file": items.path.name, "items": len(items), "bad_rows": len(items.bad_rows)},
        "run": shop.identity,
        "settings": settings,
        "samples": tally.samples,
        "turns": tally.turns,
        "images": tally.images,
        "failures": tally.failures,
        "passing_failures": tally.passing,
        "quality": None if page is None else page.relative_to(out).as_posix(),
    }
    write_manifest(out, KIND, fields, files)
    return tally, page


def _check(out: Path) -> None:
    """Raise ArtifactError where ``out`` holds something else."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out}: expected a directory or nothing there, found a file; choose another output")
    ours = (out / STATISTICS).is_file() or (out / CACHE).is_dir()
    if not ours and out.is_dir() and not set(out.iterdir()) <= set(_half_written(out)):
        raise ArtifactError(
            f"{out}: there is something here already that no augmentation has made; delete it or choose another output"
        )


def _half_written(out: Path) -> list[Path]:
    """What a killed run was about to write. Nobody else writes here while this process has the directory to itself."""
    return [path for folder in (out, out / IMAGES) for path in folder.glob(".*.tmp-*") if path.is_file()]


def _claim(out: Path) -> None:
    """Make the directory, mark it as one of an augmentation, and clear what a killed run left half-written."""
    for path in _half_written(out):
        path.unlink(missing_ok=True)
    if not (out / STATISTICS).is_file():
        atomic_write(out / STATISTICS, json.dumps({"state": "running"}) + "\n")


def _write_statistics(summary: Summary, problems: list[dict[str, str]]) -> None:
    about = {
        "state": "done",
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(summary.seconds, 2),
        "items": summary.items,
        "kept": summary.kept,
        "accounting": summary.accounting,
        "image_problems": problems,
    }
    atomic_write(summary.out / STATISTICS, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _named_troubles(out: Path) -> Iterator[None]:
    """A full disk, a folder that may not be written, an image that is gone: said with the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise KoreError(
            f"{error.filename or out}: {why}; what is done is kept, the same command goes on when this is put right"
        ) from error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, where signals can be caught: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
