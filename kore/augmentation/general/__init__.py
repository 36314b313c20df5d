"""General augmentation, to compare with: the article in other words, or its image in other forms.

As in the paper's comparison (Table 6) there are four methods. Each makes conversations of one round, a request for a
caption with the article as the answer; the first is always the article and its image as they are.

* ``text-aware``: a language model rewrites the text and keeps its facts.
* ``text-agnostic``: words are replaced by synonyms, swapped or deleted, whatever they mean, names and numbers too.
  The synonyms are English, and words are what stands between spaces.
* ``image-aware``: brightness, contrast, colour, small turns and mild crops, which leave visible what is shown.
* ``image-agnostic``: random crops, flips, strong turns and colours.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from kore.augmentation.ask import NotGenerated
from kore.augmentation.chance import stream
from kore.augmentation.checks import supported
from kore.augmentation.general.pictures import altered
from kore.augmentation.general.words import disturbed
from kore.augmentation.texts import Texts, item_words
from kore.augmentation.types import Candidate, Failure, ItemResult, KnowledgeItem, Sample, StoredImage
from kore.augmentation.words import english
from kore.errors import ConfigError, DataError, Unavailable

if TYPE_CHECKING:
    from kore.augmentation.ask import Asker
    from kore.augmentation.images import Images

GENERAL = ("text-aware", "text-agnostic", "image-aware", "image-agnostic")
SAMPLES = 8
_SHORTEST = 0.4
_TRIES = 8


class Rephrased(BaseModel):
    """A text in other words."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)
    text: str = Field(min_length=1, description="The text in other words, with all its facts.")


def augment_general(
    item: KnowledgeItem,
    method: str,
    texts: Texts,
    asker: Asker,
    images: Images | None,
    seed: int,
    *,
    samples: int = SAMPLES,
) -> ItemResult:
    """One of :data:`GENERAL` for one item.

    Args:
        samples: Conversations, the unchanged one included; by default as many as the four tasks make of an item.

    Returns:
        What could be made. A variant that cannot be is a failure with its reason.

    Raises:
        ConfigError: There is no such method.
        KoreError: Of a sort that other items would meet too, such as a wrong key or a generator by rules, which cannot
            rephrase.
    """
    if method not in GENERAL:
        raise ConfigError(f"general: expected one of {', '.join(GENERAL)}, got {method!r}")
    made: list[Sample] = []
    failures: list[Failure] = []
    try:
        for turn, image in _variants(item, method, texts, asker, images, seed, samples, failures):
            made.append(Sample(f"{item.id}-general-{len(made)}", item.id, "dialogue", (turn,), image))
    except (NotGenerated, DataError) as error:
        failures.append(Failure(item.id, "dialogue", str(error)))
    except Unavailable as error:
        failures.append(Failure(item.id, "dialogue", str(error), passing=True))
    return ItemResult(item, tuple(made), tuple(failures))


def _variants(
    item: KnowledgeItem,
    method: str,
    texts: Texts,
    asker: Asker,
    images: Images | None,
    seed: int,
    samples: int,
    failures: list[Failure],
) -> Iterator[tuple[tuple[str, str], StoredImage | None]]:
    image = None if item.image is None or images is None else images.store.keep(item.image)
    rng = stream(seed, item.id, "dialogue")
    if image is None:
        question = texts.round(rng, "dialogue", f"{item.category}_without_image", **item_words(item))[0]
    else:
        question = texts.instructed(rng, texts.line(rng, "caption", item.category, **item_words(item)), "paragraph")
    yield (question, item.text), image
    told = {_plain(item.text)}
    for number in range(1, samples):
        drawing = stream(seed, item.id, method, number)
        if method.startswith("image"):
            if image is None or images is None:
                raise DataError("the item has no image to change")
            yield (question, item.text), _changed(image, item, images, method == "image-aware", drawing)
            continue
        if method == "text-aware":
            try:
                text = _rephrased(item, texts, asker, drawing, number, samples - 1, told)
            except NotGenerated as error:
                failures.append(Failure(item.id, "dialogue", f"{error} (version {number})"))
                continue
        else:
            groups = texts.variants("synonyms", "groups")
            attempts = (disturbed(item.text, groups, drawing) for _ in range(_TRIES))
            text = next((each for each in attempts if _plain(each) not in told), "")
            if not text:
                raise DataError(f"the text has too few words for {samples} versions of it")
        told.add(_plain(text))
        yield (question, text), image


def _rephrased(
    item: KnowledgeItem, texts: Texts, asker: Asker, rng: Any, number: int, count: int, told: set[str]
) -> str:
    words = len(item.text.split())
    messages = texts.messages(
        "rephrase",
        rng,
        title=item.title,
        type=item.type,
        category=item.category,
        text=item.text,
        words=_longest(words),
        number=number,
        count=count,
    )

    def check(given: Rephrased) -> tuple[Rephrased | None, list[str]]:
        reasons = rephrasing_faults(item, given.text)
        if _plain(given.text) in told:
            reasons.append("The text is one that was given already.")
        return (None, reasons) if reasons else (given, [])

    return str(asker.ask("dialogue", item, messages, Rephrased, check, max_tokens=100 + 4 * words).text)


def rephrasing_faults(item: KnowledgeItem, text: str) -> list[str]:
    """Why a rephrasing is not one: numbers or names lost or new, much too short or long.

    Names are told by their capitals, so that only those of texts in English are compared.
    """
    faults = []
    ours, theirs = _numbers(item.text), _numbers(text)
    if lost := sorted(ours - theirs):
        faults.append(f"The text lacks {', '.join(lost)}; keep every number.")
    if new := sorted(theirs - ours - _numbers(item.title)):
        faults.append(f"The text has {', '.join(new)}, which the original has not; add nothing.")
    evidence = f"{item.title}\n{item.text}"
    named = english(item.text)
    if gone := sorted({name for name in _inner_names(item.text) if supported(text, name) < 1}) if named else []:
        faults.append(f"The text lacks {', '.join(gone[:6])}; keep every name.")
    if strange := sorted({name for name in _inner_names(text) if supported(evidence, name) < 1}) if named else []:
        faults.append(f"The text names {', '.join(strange[:6])}, which the original does not; add nothing.")
    words, own = len(text.split()), len(item.text.split())
    if not _SHORTEST * own <= words <= _longest(own):
        least = math.ceil(_SHORTEST * own)
        faults.append(f"The text has {words} words; keep between {least} and {_longest(own)}.")
    return faults


def _longest(words: int) -> int:
    """The longest that a text of so many words may become."""
    return words + max(10, words // 2)


def _changed(image: StoredImage, item: KnowledgeItem, images: Images, aware: bool, rng: Any) -> StoredImage:
    """A changed copy in the store, with the original's place."""
    from kore.fetch import open_image

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "changed.png"
        altered(open_image(image.path), aware, rng).save(file)
        stored = images.store.fetch(dataclasses.replace(image.candidate, path=file, title=f"{item.title}, changed"))
    candidate: Candidate = dataclasses.replace(stored.candidate, path=image.candidate.path)
    return dataclasses.replace(stored, candidate=candidate)


def _numbers(text: str) -> set[str]:
    return {re.sub(r"[,\s](?=\d{3})", "", match) for match in re.findall(r"\d+(?:[.,]\d+)*", text)}


def _inner_names(text: str) -> list[str]:
    """Words with a capital that do not begin a sentence."""
    found = re.finditer(r"(?<=[\w,;])\s+([^\W\d_][\w-]*)", text)
    return [match.group(1) for match in found if match.group(1)[0].isupper()]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
