"""Search by words: BM25 over short descriptions."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

_K1, _B = 1.2, 0.75
_WORD = re.compile(r"[^\W_]+")


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers, without accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _WORD.findall(plain.casefold())


class WordIndex:
    """Ranks descriptions by the words they share with a query; rare words count more, long descriptions less."""

    def __init__(self, descriptions: Sequence[str]) -> None:
        counts = [Counter(tokens(text)) for text in descriptions]
        self._lengths = [sum(count.values()) for count in counts]
        self._mean = max(1.0, sum(self._lengths) / max(1, len(counts)))
        self._places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, count in enumerate(counts):
            for word, times in count.items():
                self._places[word].append((number, times))

    def search(self, query: str) -> list[int]:
        """The numbers of all descriptions that share a word with the query, the best first."""
        scores: dict[int, float] = defaultdict(float)
        total = len(self._lengths)
        for word in sorted(set(tokens(query))):
            places = self._places.get(word, [])
            rarity = math.log(1 + (total - len(places) + 0.5) / (len(places) + 0.5))
            for number, times in places:
                length = 1 - _B + _B * self._lengths[number] / self._mean
                scores[number] += rarity * times * (_K1 + 1) / (times + _K1 * length)
        return sorted(scores, key=lambda number: (-scores[number], number))
