"""Results as files for training: LLaVA, ShareGPT with an entry for LLaMA-Factory, OpenAI messages, plain texts.

Every writer takes one sample at a time and holds none of them.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kore.artifacts import remove_abandoned
from kore.augmentation.images.store import describe
from kore.augmentation.types import Failure, ItemResult, Sample, StoredImage
from kore.data.types import IMAGE_MARK, BadRow

IMAGES = "images"
LLAVA, SHAREGPT, DATASET_INFO, OPENAI, PLAIN = (
    "llava.json",
    "sharegpt.json",
    "dataset_info.json",
    "openai.jsonl",
    "plain.json",
)
FAILURES, IMAGE_LIST = "failures.jsonl", "images.json"
_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


class Tally:
    """What was written: samples and their questions by task, images, failures and how many of them may pass."""

    def __init__(self) -> None:
        self.items = 0
        self.samples: dict[str, int] = {}
        self.turns: dict[str, int] = {}
        self.images = 0
        self.failures = 0
        self.passing = 0
        self.reasons: dict[tuple[str, str], int] = {}
        self.first = ""


def write_outputs(
    results: Iterable[ItemResult],
    out: Path,
    *,
    formats: Iterable[str] = ("llava",),
    name: str = "kore_knowledge",
    openai_images: str = "path",
    bad_rows: Iterable[BadRow] = (),
) -> tuple[Tally, Iterable[Path]]:
    """Write all files of a result into ``out``, in the order of ``results``; each appears whole or not at all.

    Images are linked, or copied where that is not possible, from their store into ``out/images``; images of an earlier
    result that are not used any more are removed, as are files of formats that are not asked for.

    Returns:
        What was written, and the paths of all files.
    """
    formats = set(formats) | {"llava"}
    tally = Tally()
    with contextlib.ExitStack() as files:
        images = _Images(out / IMAGES, files.enter_context(_rows(out / IMAGE_LIST)))
        rows: list[Callable[[Sample], Any]] = []

        def table(file: str, row: Callable[[Sample], Any], lines: bool = False) -> None:
            write = files.enter_context(_rows(out / file, lines))
            rows.append(lambda sample: write(row(sample)))

        table(LLAVA, lambda sample: _llava(sample, images))
        if "sharegpt" in formats:
            table(SHAREGPT, lambda sample: _sharegpt(sample, images))
        if "openai" in formats:
            table(OPENAI, lambda sample: _openai(sample, images, openai_images), lines=True)
        plain = files.enter_context(_rows(out / PLAIN)) if "plain" in formats else None
        failed = files.enter_context(_rows(out / FAILURES, lines=True))
        for bad in bad_rows:
            failed({"item": None, "task": None, "reason": bad.reason, "source": bad.source})
        for result in results:
            tally.items += 1
            for sample in result.samples:
                for write in rows:
                    write(sample)
                tally.samples[sample.task] = tally.samples.get(sample.task, 0) + 1
                tally.turns[sample.task] = tally.turns.get(sample.task, 0) + len(sample.turns)
            if plain is not None:
                for row in _plain(result, images):
                    plain(row)
            for failure in result.failures:
                failed(_failure(failure, result.item.source))
                tally.failures += 1
                tally.passing += failure.passing
                tally.first = tally.first or failure.reason
                kind = (failure.task, reason_kind(failure.reason))
                tally.reasons[kind] = tally.reasons.get(kind, 0) + 1
    tally.images = len(images)
    written = [out / LLAVA, out / FAILURES, out / IMAGE_LIST]
    written += [out / file for kind, file in _FILES.items() if kind in formats]
    if "sharegpt" in formats:
        _whole(out / DATASET_INFO, json.dumps(dataset_info(name), indent=2) + "\n")
        written.append(out / DATASET_INFO)
    for other in {*_FILES.values(), DATASET_INFO} - {path.name for path in written}:
        (out / other).unlink(missing_ok=True)
    images.remove_others()
    return tally, itertools.chain(written, images.files())


_NUMBERED = re.compile(r"^(?:question|round) \d+: ", re.IGNORECASE)
_FILES = {"sharegpt": SHAREGPT, "openai": OPENAI, "plain": PLAIN}


def dataset_info(name: str) -> dict[str, Any]:
    """The entry of ``dataset_info.json`` by which LLaMA-Factory finds ``sharegpt.json``."""
    columns = {"messages": "conversations", "images": "images"}
    return {name: {"file_name": SHAREGPT, "formatting": "sharegpt", "columns": columns}}


def reason_kind(reason: str) -> str:
    """The first words of a reason, which many failures share."""
    return _NUMBERED.sub("", reason).split(":", 1)[0].split(";", 1)[0].strip()[:80]


class _Images:
    """The images of a result: put where they lie, and listed, when the first sample has them."""

    def __init__(self, folder: Path, listed: Callable[[Mapping[str, Any]], None]) -> None:
        self.folder, self._listed = folder, listed
        self._used: set[str] = set()

    def __len__(self) -> int:
        return len(self._used)

    def name(self, image: StoredImage) -> str:
        """The image's path relative to the result, put there if it is not."""
        name = image.path.name
        if name not in self._used:
            _link(image.path, self.folder / name)
            size = {"sha256": image.sha256, "width": image.width, "height": image.height}
            self._listed({"image": f"{IMAGES}/{name}", **size, **describe(image.candidate)})
            self._used.add(name)
        return f"{IMAGES}/{name}"

    def files(self) -> Iterator[Path]:
        return (self.folder / name for name in self._used)

    def remove_others(self) -> None:
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name not in self._used:
                    entry.unlink()


def _llava(sample: Sample, images: _Images) -> dict[str, Any]:
    image = {} if sample.image is None else {"image": images.name(sample.image)}
    return {"id": sample.id, **image, "conversations": _turns(sample)}


def _sharegpt(sample: Sample, images: _Images) -> dict[str, Any]:
    named = [] if sample.image is None else [images.name(sample.image)]
    return {"id": sample.id, "conversations": _turns(sample), "images": named}


def _turns(sample: Sample) -> list[dict[str, str]]:
    turns = []
    for number, (question, answer) in enumerate(sample.turns):
        mark = f"{IMAGE_MARK}\n" if number == 0 and sample.image is not None else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return turns


def _openai(sample: Sample, images: _Images, how: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(sample.turns):
        content: Any = question
        if number == 0 and sample.image is not None:
            url = images.name(sample.image) if how == "path" else _data_url(sample.image.path)
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": sample.id, "messages": messages}


def _data_url(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"data:{_TYPES.get(path.suffix.lower(), 'application/octet-stream')};base64,{data}"


def _plain(result: ItemResult, images: _Images) -> Iterator[dict[str, Any]]:
    """The article as it is: the first question of the dialogue, and the whole text as its answer."""
    dialogue = next((sample for sample in result.samples if sample.task == "dialogue"), None)
    if dialogue is not None:
        turns = ((dialogue.turns[0][0], result.item.text),)
        yield _llava(Sample(f"{result.item.id}-plain", result.item.id, "dialogue", turns, dialogue.image), images)


def _failure(failure: Failure, source: str) -> dict[str, Any]:
    about = {"item": failure.item, "task": failure.task, "reason": failure.reason, "source": source}
    return {**about, "passing": True} if failure.passing else about


@contextlib.contextmanager
def _rows(path: Path, lines: bool = False) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes one row of a JSON array, or of JSON lines, to a file that appears when the block ends."""
    with _appearing(path) as file:
        first = True

        def write(row: Mapping[str, Any]) -> None:
            nonlocal first
            text = json.dumps(row, ensure_ascii=False)
            file.write(text + "\n" if lines else ("[\n" if first else ",\n") + text)
            first = False

        yield write
        if not lines:
            file.write("[]\n" if first else "\n]\n")


def _whole(path: Path, text: str) -> None:
    with _appearing(path) as file:
        file.write(text)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[IO[str]]:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
