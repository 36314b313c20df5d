"""Search with Google's Programmable Search (the Custom Search JSON API) and the user's own key.

Google takes no new customers for this API and has announced its end for January 2027; ``serpapi`` searches the same
images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from kore.augmentation.images.service import ask, entries, environment, link, text
from kore.augmentation.types import Candidate
from kore.fetch import Downloader

API = "https://www.googleapis.com/customsearch/v1"
PAGE = 10
"""The most results that the API gives at once."""


class Google:
    """Image results of a search engine that the user has set up.

    The API names no licences; a filter by usage rights is recorded as what was asked for.
    """

    def __init__(self, download: Downloader, rights: str = "", base_url: str = API) -> None:
        self._download, self._rights, self._base_url = download, rights, base_url
        self._key = environment("GOOGLE_API_KEY", "the key of Google's Custom Search JSON API")
        self._engine = environment("GOOGLE_CSE_ID", "the id (cx) of your Programmable Search Engine")

    def identity(self) -> Mapping[str, Any]:
        engine = hashlib.sha256(self._engine.encode()).hexdigest()[:16]
        return {"kind": "google", "api": self._base_url, "engine": engine, "rights": self._rights}

    def search(self, query: str, count: int) -> Sequence[Candidate]:
        found: list[Candidate] = []
        while len(found) < count:
            number = min(PAGE, count - len(found))
            items = entries(self._page(query, number, 1 + len(found)), "items", self._base_url)
            found += [self._candidate(item) for item in items if isinstance(item.get("link"), str)]
            if len(items) < number:
                break
        return found[:count]

    def _page(self, query: str, number: int, start: int) -> dict[str, Any]:
        parameters: dict[str, str | int] = {
            "key": self._key,
            "cx": self._engine,
            "q": query,
            "searchType": "image",
            "safe": "active",
            "num": number,
            "start": start,
        }
        if self._rights:
            parameters["rights"] = self._rights
        return ask(self._download, self._base_url, parameters)

    def _candidate(self, item: Mapping[str, Any]) -> Candidate:
        image = item.get("image")
        page = link(image.get("contextLink")) if isinstance(image, dict) else ""
        licence = f"unknown (searched with rights={self._rights})" if self._rights else "unknown"
        return Candidate(url=item["link"], page=page, title=text(item.get("title")), licence=licence)
