"""Search on Wikimedia Commons, or another MediaWiki with its files' licences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kore.augmentation.images.service import ask, link, text
from kore.augmentation.types import Candidate
from kore.errors import KoreError, Unavailable
from kore.fetch import Downloader

API = "https://commons.wikimedia.org/w/api.php"
HOSTS = ("thumb.wikimedia.org", "upload.wikimedia.org")
"""Where Wikimedia keeps reduced and original files."""
WIDTH = 960
"""One of the widths that Wikimedia keeps ready; others cost its servers work and are refused at times."""

_OPERATORS = re.compile(r"[^\w\s]+|_")
_PASSING = ("maxlag", "ratelimited", "readonly", "internal_api_error", "cirrussearch-")


class Commons:
    """Files of a MediaWiki by full-text search, as bitmaps of a moderate width.

    Licence and author are those of the file's description page.
    """

    def __init__(self, download: Downloader, base_url: str = API) -> None:
        self._download, self._base_url = download, base_url

    def identity(self) -> Mapping[str, Any]:
        return {"kind": "commons", "api": self._base_url, "width": WIDTH}

    def search(self, query: str, count: int) -> Sequence[Candidate]:
        words = " ".join(_OPERATORS.sub(" ", query).split())
        if not words:
            return []
        answer = ask(
            self._download,
            self._base_url,
            {
                "action": "query",
                "format": "json",
                "formatversion": 2,
                "maxlag": 5,
                "generator": "search",
                "gsrsearch": f"filetype:bitmap {words}",
                "gsrnamespace": 6,
                "gsrlimit": count,
                "prop": "imageinfo",
                "iiprop": "url|extmetadata",
                "iiurlwidth": WIDTH,
                "iiextmetadatafilter": "LicenseShortName|UsageTerms|Artist",
            },
        )
        if isinstance(error := answer.get("error"), dict):
            code = str(error.get("code", "unknown"))
            kind = Unavailable if code.startswith(_PASSING) else KoreError
            raise kind(f"{self._base_url}: the search failed: {code} ({text(error.get('info'))})")
        query_part = answer.get("query")
        pages = query_part.get("pages", []) if isinstance(query_part, dict) else []
        pages = [page for page in pages if isinstance(page, dict)]
        pages.sort(key=lambda page: page.get("index", 0))
        return [found for page in pages if (found := _candidate(page))][:count]


def _candidate(page: Mapping[str, Any]) -> Candidate | None:
    info = (page.get("imageinfo") or [None])[0]
    if not isinstance(info, dict):
        return None
    url = info.get("thumburl") or info.get("url")
    if not isinstance(url, str):
        return None
    extra = info.get("extmetadata")
    extra = extra if isinstance(extra, dict) else {}

    def field(name: str) -> str:
        entry = extra.get(name)
        return text(entry.get("value")) if isinstance(entry, dict) else ""

    return Candidate(
        url=url,
        page=link(info.get("descriptionurl")),
        title=text(page.get("title")).removeprefix("File:"),
        licence=field("LicenseShortName") or field("UsageTerms") or "unknown",
        author=field("Artist"),
    )
