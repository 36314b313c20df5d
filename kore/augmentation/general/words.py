"""Knowledge-agnostic changes of a text: synonyms, swaps and deletions of words, without regard to what they mean."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

SHARE = 0.1
Groups = Sequence[Sequence[str]]


def disturbed(text: str, groups: Groups, rng: random.Random) -> str:
    """The text with one sort of change, drawn at random, to a tenth of its words but at least one.

    Where none of its words has a synonym, words are swapped or deleted.
    """
    changes: list[Callable[[list[str]], bool]] = [
        lambda words: _replace(words, groups, rng),
        lambda words: _swap(words, rng),
        lambda words: _delete(words, rng),
    ]
    rng.shuffle(changes)
    words = text.split()
    for change in changes:
        if change(words):
            break
    return " ".join(words)


def _times(words: list[str]) -> int:
    return max(1, round(SHARE * len(words)))


def _replace(words: list[str], groups: Groups, rng: random.Random) -> bool:
    """Replace words by others of their group, in place; False where no word has one."""
    others: dict[str, list[str]] = {}
    for group in groups:
        for word in group:
            others.setdefault(word, []).extend(other for other in group if other != word)
    places = [
        (place, match) for place, word in enumerate(words) if (match := _bare(word)) and match[1].lower() in others
    ]
    rng.shuffle(places)
    for place, (before, word, after) in places[: _times(words)]:
        new = rng.choice(others[word.lower()])
        words[place] = before + (new[0].upper() + new[1:] if word[0].isupper() else new) + after
    return bool(places)


def _bare(word: str) -> tuple[str, str, str] | None:
    """What precedes a word, the word, and what follows it, such as a comma."""
    match = re.fullmatch(r"(\W*)(\w[\w'’-]*\w|\w)(\W*)", word)
    return None if match is None else (match[1], match[2], match[3])


def _swap(words: list[str], rng: random.Random) -> bool:
    """Swap words, in place; False where there are none to swap."""
    if len(words) < 2:
        return False
    for _ in range(_times(words)):
        first, second = rng.sample(range(len(words)), 2)
        words[first], words[second] = words[second], words[first]
    return True


def _delete(words: list[str], rng: random.Random) -> bool:
    """Delete words, in place, but not the last; False where there is only one."""
    if len(words) < 2:
        return False
    for _ in range(min(_times(words), len(words) - 1)):
        del words[rng.randrange(len(words))]
    return True
