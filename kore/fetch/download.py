"""The only way KORE gets something from the network.

Nothing is fetched without an :class:`~kore.fetch.addresses.Allowlist`. A name is looked up once, every address it has
must be public, and the connection goes to one of these. Redirects are followed by hand and checked like a first URL.
Sizes and times are capped while reading, and hosts are asked at a polite pace.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

from kore import __version__
from kore.errors import KoreError, Unavailable
from kore.fetch.addresses import Allowlist, Refused, Target, check_url, is_public, redact
from kore.fetch.connection import Deadline, Exchange
from kore.fetch.images import IMAGE_HEAD, image_kind
from kore.fetch.pacing import Pacer

_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)
_ERROR_BYTES = 64 * 1024

Resolver = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True)
class DownloadLimits:
    """How much a download may take.

    Attributes:
        max_bytes: The largest body.
        timeout: Seconds for the whole of one request, without redirects, the pace, and the look-up of the name, for
            which the system has its own limits.
        read_timeout: Seconds for the connection and for each single read.
        max_redirects: The longest chain of redirects.
        delay: Seconds between two requests to one host.
        attempts: How often a request is made in all when it fails in passing.
        backoff: Seconds before the second attempt; doubled before each further one.
        max_wait: The longest Retry-After that is waited for; after a longer one the download is given up.
    """

    max_bytes: int = 32 * 1024 * 1024
    timeout: float = 60.0
    read_timeout: float = 15.0
    max_redirects: int = 4
    delay: float = 1.0
    attempts: int = 3
    backoff: float = 1.0
    max_wait: float = 60.0


@dataclass(frozen=True)
class Download:
    """What came: the URL after redirects, the body, and the headers with lower-case names."""

    url: str
    body: bytes
    headers: Mapping[str, str]


def _look_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _retry_after(headers: Mapping[str, str]) -> float:
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _said(body: bytes, url: str) -> str:
    """A short quotation of an error's body without anything that the query said, since servers echo keys."""
    try:
        answer = json.loads(body)
        error = answer.get("error") if isinstance(answer, dict) else None
        text = error.get("message") or error.get("info") if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        return ""
    if not isinstance(text, str):
        return ""
    for _, value in parse_qsl(urlsplit(url).query):
        if len(value) > 3:
            text = text.replace(value, "…")
    return f" ({''.join(letter for letter in text if letter.isprintable())[:200]})"


class LeftAlone(Unavailable):
    """The server asks for a silence longer than this program waits."""


class Answered(KoreError):
    """The server answers with a lasting error; ``status`` is its number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unfit(KoreError):
    """What is there is no image, too large or encoded, and will be so next time."""


class Downloader:
    """Downloads under one set of rules. Several threads may use it at once, and share its pace.

    Args:
        allow: Where it may go.
        limits: How much it may take.
        contact: A web page or address of whoever runs it, told to the servers in the User-Agent.
        resolve: The addresses of a host and port, in place of the system's look-up.
        context: TLS settings in place of the system's.
    """

    def __init__(
        self,
        allow: Allowlist,
        limits: DownloadLimits | None = None,
        *,
        contact: str = "",
        resolve: Resolver | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        if not contact.isascii() or not contact.isprintable():
            raise KoreError("contact: expected an e-mail address or a URL in plain ASCII")
        self.allow, self.limits = allow, limits or DownloadLimits()
        self.agent = f"kore-lmm/{__version__} (KORE-Augmentation{f'; {contact}' if contact else ''})"
        self._resolve, self._context, self._pacer = resolve or _look_up, context, Pacer()

    def get(self, url: str, accept: str = "*/*") -> Download:
        """Fetch a URL, whatever it is.

        Raises:
            Refused: The rules forbid the URL, one of its addresses, or where it redirects to.
            Unavailable: A passing failure, after :attr:`DownloadLimits.attempts` attempts.
            KoreError: A lasting one, such as a missing page or a body over the cap. No message holds a query.
        """
        return self._get(url, accept, None)

    def image(self, url: str) -> Download:
        """Fetch a JPEG, PNG, WebP or GIF image, told by its first bytes and not by what the server calls it.

        Raises:
            As :meth:`get`, and KoreError for anything but such an image.
        """
        return self._get(url, "image/jpeg, image/png, image/webp, image/gif;q=0.8", _check_image)

    def json(self, url: str) -> Any:
        """Fetch and parse JSON. Raises as :meth:`get`, and Unavailable for an answer that is not JSON."""
        body = self._get(url, "application/json", None).body
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise Unavailable(f"{redact(url)}: expected JSON, got {_describe(body)}") from None

    def _get(self, url: str, accept: str, check: Callable[[bytes, str], None] | None) -> Download:
        for attempt in range(1, self.limits.attempts + 1):
            try:
                return self._follow(url, accept, check)
            except LeftAlone:
                raise
            except Unavailable:
                if attempt == self.limits.attempts:
                    raise
                time.sleep(self.limits.backoff * 2 ** (attempt - 1))
        raise AssertionError

    def _follow(self, url: str, accept: str, check: Callable[[bytes, str], None] | None) -> Download:
        seen = []
        while True:
            seen.append(url)
            target = check_url(url, self.allow)
            response = self._once(target, accept, check)
            if isinstance(response, Download):
                return response
            try:
                location = urljoin(url, response)
            except ValueError:
                raise Refused(f"{redact(url)}: redirects to a malformed URL") from None
            if target.scheme == "https" and not location.lower().startswith("https:"):
                raise Refused(f"{redact(url)}: redirects from https to {redact(location)}")
            if location in seen or len(seen) > self.limits.max_redirects:
                raise KoreError(f"{redact(seen[0])}: redirects {len(seen)} times and does not arrive")
            url = location

    def _addresses(self, target: Target) -> Sequence[str]:
        shown = redact(target.url)
        try:
            addresses = self._resolve(target.host, target.port)
        except socket.gaierror as error:
            # Without a network every name is unknown, so this says nothing lasting about the host.
            raise Unavailable(f"{shown}: the name {target.host} has no address ({error.strerror})") from None
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"{shown}: the name {target.host} cannot be looked up ({error})") from None
        if not addresses:
            raise Unavailable(f"{shown}: the name {target.host} has no address")
        for address in addresses:
            if not self.allow.allow_private and not is_public(address):
                raise Refused(f"{shown}: {target.host} is at {address}, which is not a public address; not fetched")
        return addresses

    def _once(self, target: Target, accept: str, check: Callable[[bytes, str], None] | None) -> Download | str:
        """The response to one request, or where it redirects to."""
        shown = redact(target.url)
        addresses = self._addresses(target)
        if silence := self._pacer.wait(target.host, self.limits.delay, self.limits.max_wait):
            raise LeftAlone(f"{shown}: {target.host} asks to be left alone for {silence:.0f} s; try again later")
        headers = {"User-Agent": self.agent, "Accept": accept}
        deadline = Deadline(self.limits.timeout, self.limits.read_timeout)
        try:
            with self._connect(target, addresses, headers, deadline) as exchange:
                return self._read(target, exchange, check)
        except ssl.SSLCertVerificationError as error:
            raise KoreError(f"{shown}: its TLS certificate is not valid ({error.verify_message})") from None
        except TimeoutError:
            limits = f"{self.limits.read_timeout:g} s a read, {self.limits.timeout:g} s in all"
            raise Unavailable(f"{shown}: no whole answer in time ({limits})") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise Unavailable(f"{shown}: the connection failed ({reason})") from None

    def _connect(
        self, target: Target, addresses: Sequence[str], headers: Mapping[str, str], deadline: Deadline
    ) -> Exchange:
        if target.scheme == "https" and self._context is None:
            self._context = ssl.create_default_context()
        for address in addresses[:-1]:
            try:
                return Exchange(target, address, headers, deadline, self._context)
            except ssl.SSLCertVerificationError:
                raise
            except OSError:
                continue
        return Exchange(target, addresses[-1], headers, deadline, self._context)

    def _read(self, target: Target, exchange: Exchange, check: Callable[[bytes, str], None] | None) -> Download | str:
        shown, status = redact(target.url), exchange.status
        location = exchange.headers.get("location", "")
        if status in _REDIRECTS and location:
            with contextlib.suppress(UnicodeError):
                location = location.encode("latin-1").decode()
            return location
        # MediaWiki answers 200 with Retry-After when its databases are too busy to be asked.
        busy = status == 200 and check is None and _retry_after(exchange.headers) > 0
        if status != 200 or busy:
            said = "" if check else _said(_beginning(exchange, _ERROR_BYTES), target.url)
            message = f"{shown}: the server answers {status}{said}"
            if status not in _PASSING and status < 500 and not busy:
                raise Answered(message, status)
            # Other threads keep away from an overloaded server that names no time.
            wait = _retry_after(exchange.headers) or (self.limits.backoff if status in (429, 503) else 0.0)
            self._pacer.block(target.host, wait)
            if wait > self.limits.max_wait:
                raise LeftAlone(f"{message} and asks to be left alone for {wait:.0f} s; try again later")
            raise Unavailable(message)
        encoding = exchange.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise Unfit(f"{shown}: its content is encoded ({encoding[:20]!r}), though it was asked not to be")
        return Download(target.url, self._body(target, exchange, check), exchange.headers)

    def _body(self, target: Target, exchange: Exchange, check: Callable[[bytes, str], None] | None) -> bytes:
        shown, limit = redact(target.url), self.limits.max_bytes
        if (announced := exchange.length or 0) > limit:
            raise Unfit(f"{shown}: {min(announced, 10**18)} bytes; the limit is {limit}")
        body = bytearray()
        while part := exchange.read():
            body += part
            if len(body) > limit:
                raise Unfit(f"{shown}: more than {limit} bytes, the limit")
            if check and len(body) >= IMAGE_HEAD:
                check(bytes(body[:IMAGE_HEAD]), shown)
                check = None
        if check:
            check(bytes(body), shown)
        return bytes(body)


def _beginning(exchange: Exchange, limit: int) -> bytes:
    """What an error's body begins with, as far as it comes."""
    body = bytearray()
    with contextlib.suppress(OSError, http.client.HTTPException):
        while len(body) < limit and (part := exchange.read()):
            body += part
    return bytes(body)


def _describe(body: bytes) -> str:
    start = body[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not body:
        return "an empty answer"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if b"<svg" in start:
        return "an SVG drawing"
    return "something else"


def _check_image(head: bytes, shown: str) -> None:
    if image_kind(head) is None:
        raise Unfit(f"{shown}: expected a JPEG, PNG, WebP or GIF image, got {_describe(head)}")


def download(url: str, limits: DownloadLimits, allow: Allowlist) -> Download:
    """Fetch one URL. For several, a :class:`Downloader` also keeps the pace. Raises as :meth:`Downloader.get`."""
    return Downloader(allow, limits).get(url)


def download_json(url: str, limits: DownloadLimits, allow: Allowlist) -> Any:
    """Fetch one JSON document. Raises as :meth:`Downloader.json`."""
    return Downloader(allow, limits).json(url)
