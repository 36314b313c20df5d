"""From a rendered conversation to token ids and labels, with image placeholders expanded and a length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from kore.data.template import Answer, Rendered
from kore.errors import DataError, ModelError

IGNORE = -100


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels of one example; ``images`` of its images are left, ``cut`` tokens were cut off."""

    ids: list[int]
    labels: list[int]
    images: int
    cut: int = 0

    @property
    def answer_tokens(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def tokenize(tokenizer: Any, rendered: Rendered) -> tuple[list[int], list[int], int]:
    """Tokenise once and label the answers; (ids, labels, length of the generation prompt).

    A label is the token itself on answer tokens and on the token that ends the turn, else -100. Where the
    template puts no such token after an answer, the end-of-sequence token is added.
    """
    bos = tokenizer.bos_token
    encoded = tokenizer(
        rendered.text,
        add_special_tokens=not (bos and rendered.text.startswith(bos)),
        return_offsets_mapping=True,
        truncation=False,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while ids and tuple(offsets[-1]) == (0, 0) and len(ids) > 1:
        ids.pop(), offsets.pop()
    tail = sum(start >= rendered.tail and end > start for start, end in offsets)
    labels = [IGNORE] * len(ids)
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for answer in reversed(rendered.answers):
        _label(ids, labels, offsets, answer, special, tokenizer.eos_token_id)
    return ids, labels, tail


def _label(
    ids: list[int],
    labels: list[int],
    offsets: list[tuple[int, int]],
    answer: Answer,
    special: set[int],
    eos: int | None,
) -> None:
    """Label one answer in place. Answers are done last to first, so that adding a token moves no other answer."""
    inside = [
        index
        for index, (start, end) in enumerate(offsets)
        if start < answer.end and (end > answer.start or start >= answer.start) and end > 0
    ]
    spoken = [index for index in inside if offsets[index][0] < answer.text_end]
    if not spoken:
        raise DataError("the tokenizer has no tokens for an answer")
    ending = next((index for index in inside[len(spoken) :] if ids[index] in special), None)
    for index in spoken if ending is None else range(spoken[0], ending + 1):
        labels[index] = ids[index]
    if ending is not None:
        return
    if eos is None:
        raise ModelError("the chat template ends no turn and the tokenizer has no eos_token; set one")
    at = spoken[-1] + 1
    last = inside[-1] + 1 == len(ids)
    if last:
        del ids[at:], labels[at:], offsets[at:]
    ids.insert(at, eos)
    labels.insert(at, eos)
    offsets.insert(at, (0, 0))


def expand(ids: Sequence[int], labels: Sequence[int], counts: Sequence[int], image_token: int | None) -> Tokens:
    """Repeat each image placeholder as often as its image has tokens.

    Raises:
        DataError: There are not as many placeholders as images.
    """
    places = [index for index, token in enumerate(ids) if token == image_token]
    if len(places) != len(counts):
        raise DataError(f"the rendered text has {len(places)} image placeholder(s) for {len(counts)} image(s)")
    new_ids: list[int] = []
    new_labels: list[int] = []
    done = 0
    for place, count in zip(places, counts):
        new_ids += [*ids[done:place], *[ids[place]] * count]
        new_labels += [*labels[done:place], *[IGNORE] * count]
        done = place + 1
    return Tokens([*new_ids, *ids[done:]], [*new_labels, *labels[done:]], len(counts))


def truncate(
    tokens: Tokens, limit: int | None, counts: Sequence[int], tail: int, image_token: int | None, start: int | None
) -> Tokens:
    """Cut ``tokens`` to ``limit`` from the end of the text, keeping the last ``tail`` tokens (the generation prompt).

    An image whose tokens do not all fit goes as a whole, with the token ``start`` that opens it.
    """
    length = len(tokens.ids)
    if limit is None or length <= limit:
        return tokens
    if limit <= tail:
        raise DataError(f"max_length {limit} leaves no room beside the {tail} tokens of the generation prompt")
    cut, kept, place = limit - tail, 0, 0
    for count in counts:
        place = tokens.ids.index(cast(int, image_token), place)
        if place + count > cut:
            cut = min(cut, place)
            break
        kept, place = kept + 1, place + count
    while cut > 0 and tokens.ids[cut - 1] == start:
        cut -= 1
    end = length - tail
    ids = tokens.ids[:cut] + tokens.ids[end:]
    return Tokens(ids, tokens.labels[:cut] + tokens.labels[end:], kept, length - len(ids))
