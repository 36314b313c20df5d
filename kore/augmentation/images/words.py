"""Search by words: BM25 over short descriptions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
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
        import numpy

        self._size = len(descriptions)
        self._words: dict[str, int] = {}
        entries: list[tuple[int, int, int]] = []
        for number, text in enumerate(descriptions):
            for word, times in Counter(tokens(text)).items():
                entries.append((self._words.setdefault(word, len(self._words)), number, times))
        table = numpy.array(entries, dtype=numpy.int64).reshape(-1, 3)
        word, place, times = table[numpy.argsort(table[:, 0], kind="stable")].T
        counts = numpy.bincount(word, minlength=len(self._words))
        lengths = numpy.bincount(place, weights=times, minlength=self._size)
        norms = _K1 * (1 - _B + _B * lengths / max(1.0, lengths.mean() if self._size else 0.0))
        rarity = numpy.log(1 + (self._size - counts + 0.5) / (counts + 0.5))
        # The entries of word w are those from _starts[w] to _starts[w + 1].
        self._starts = numpy.concatenate([[0], numpy.cumsum(counts)])
        self._places = place.astype(numpy.int32)
        self._weights = rarity[word] * times * (_K1 + 1) / (times + norms[place])

    def search(self, query: str) -> Iterator[int]:
        """The numbers of all descriptions that share a word with the query, the best first."""
        import numpy

        scores = numpy.zeros(self._size)
        for word in sorted(set(tokens(query)) & self._words.keys()):
            entries = slice(*self._starts[self._words[word] :][:2])
            scores[self._places[entries]] += self._weights[entries]
        found = numpy.flatnonzero(scores)
        yield from (int(number) for number in found[numpy.argsort(-scores[found], kind="stable")])
