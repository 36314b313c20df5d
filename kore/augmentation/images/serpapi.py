"""Search of Google Images through SerpApi, with the user's own key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kore.augmentation.images.service import ask, entries, environment, link, text
from kore.augmentation.types import Candidate
from kore.errors import Unavailable
from kore.fetch import Downloader

API = "https://serpapi.com/search.json"


class SerpApi:
    """Image results in Google's order. Licences are recorded where a result links to one."""

    def __init__(self, download: Downloader, rights: str = "", base_url: str = API) -> None:
        self._download, self._rights, self._base_url = download, rights, base_url
        self._key = environment("SERPAPI_API_KEY", "the key of SerpApi")

    def identity(self) -> Mapping[str, Any]:
        return {"kind": "serpapi", "api": self._base_url, "rights": self._rights}

    def search(self, query: str, count: int) -> Sequence[Candidate]:
        parameters = {"engine": "google_images", "q": query, "safe": "active", "api_key": self._key}
        if self._rights:
            parameters["licenses"] = self._rights
        answer = ask(self._download, self._base_url, parameters)
        metadata = answer.get("search_metadata")
        status = metadata.get("status") if isinstance(metadata, dict) else None
        # A search without results is a success with an error.
        if status != "Success" and "error" in answer:
            said = text(answer["error"]).replace(self._key, "…")
            raise Unavailable(f"{self._base_url}: the search failed ({said})")
        results = entries(answer, "images_results", self._base_url)
        return [self._candidate(entry) for entry in results if isinstance(entry.get("original"), str)][:count]

    def _candidate(self, entry: Mapping[str, Any]) -> Candidate:
        licence = text(entry.get("license_details_url"))
        if not licence:
            licence = f"unknown (searched with licenses={self._rights})" if self._rights else "unknown"
        return Candidate(
            url=entry["original"],
            page=link(entry.get("link")),
            title=text(entry.get("title")),
            licence=licence,
            author=text(entry.get("source")),
        )
