"""What the searches on the network share."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from kore.augmentation.images.words import printable
from kore.errors import ConfigError, KoreError, Unavailable
from kore.fetch import Allowlist, Answered, Downloader, DownloadLimits

API_BYTES = 8 * 1024 * 1024
_UNSEEN = re.compile(r"<!--.*?-->|<(style|script)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"</?(br|p|div|li|ul|ol|tr|td|th|table|h[1-6])\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_LONGEST_HTML = 8_000


def api_downloader(base_url: str, settings: Any, *, allow_private: bool = False) -> Downloader:
    """A downloader that reaches the API's own host and no other."""
    host = urlsplit(base_url).netloc
    limits = DownloadLimits(max_bytes=API_BYTES, timeout=settings.timeout, delay=settings.delay)
    return Downloader(Allowlist((host,), allow_private=allow_private), limits, contact=settings.contact)


def environment(name: str, what: str) -> str:
    """A key from the environment.

    Raises:
        ConfigError: It is not set.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{what}: expected it in the environment variable {name}, which is not set")
    return value


def ask(download: Downloader, base_url: str, parameters: Mapping[str, str | int]) -> dict[str, Any]:
    """The JSON object that an API answers.

    Raises:
        ConfigError: It does not accept the key, or the program's name.
        KoreError: As Downloader.json.
    """
    try:
        answer = download.json(f"{base_url}?{urlencode(parameters, errors='replace')}")
    except Answered as error:
        if error.status in (400, 401, 403):
            raise ConfigError(f"{error}; check the key, its permissions and quota, and images.contact") from None
        raise
    if not isinstance(answer, dict):
        raise Unavailable(f"{base_url}: expected a JSON object, got {type(answer).__name__}")
    return answer


def entries(answer: Mapping[str, Any], key: str, base_url: str) -> list[dict[str, Any]]:
    """The list of objects under a key, empty where the key is missing.

    Raises:
        KoreError: Something else is there: the API is another than this program knows.
    """
    found = answer.get(key) or []
    if not isinstance(found, list):
        raise KoreError(f"{base_url}: expected a list under {key!r}, got {type(found).__name__}")
    return [entry for entry in found if isinstance(entry, dict)]


def text(value: Any) -> str:
    """A field of HTML as plain text: no tags, no entities, no line breaks, at most 300 characters."""
    if not isinstance(value, str):
        return ""
    seen = _TAG.sub("", _BREAK.sub(" ", _UNSEEN.sub("", value[:_LONGEST_HTML])))
    return printable(html.unescape(seen))[:300]


def link(value: Any) -> str:
    """The address of a web page, ``""`` for anything that a reader should not follow."""
    shown = printable(value) if isinstance(value, str) else ""
    return shown[:2000] if shown.lower().startswith(("http://", "https://")) else ""
