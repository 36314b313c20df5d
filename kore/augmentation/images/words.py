"""Search by words: BM25 over short descriptions."""

from __future__ import annotations

import heapq
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

_K1, _B = 1.2, 0.75
_WORD = re.compile(r"[^\W_]+")


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers, without accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _WORD.findall(plain.casefold())


def printable(text: str) -> str:
    """The text on one line, without what no file can hold or no reader can see, such as halves of characters."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


class WordIndex:
    """Ranks descriptions by the words they share with a query; rare words count more, long descriptions less."""

    def __init__(self, descriptions: Sequence[str]) -> None:
        counts = [Counter(tokens(text)) for text in descriptions]
        lengths = [sum(count.values()) for count in counts]
        mean = max(1.0, sum(lengths) / max(1, len(counts)))
        self._weights: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, count in enumerate(counts):
            norm = _K1 * (1 - _B + _B * lengths[number] / mean)
            for word, times in count.items():
                self._weights[word].append((number, times * (_K1 + 1) / (times + norm)))
        for word, places in self._weights.items():
            rarity = math.log(1 + (len(counts) - len(places) + 0.5) / (len(places) + 0.5))
            self._weights[word] = [(number, rarity * weight) for number, weight in places]

    def search(self, query: str) -> Iterator[int]:
        """The numbers of all descriptions that share a word with the query, the best first."""
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(set(tokens(query))):
            for number, weight in self._weights.get(word, ()):
                scores[number] += weight
        heap = [(-score, number) for number, score in scores.items()]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[1]
