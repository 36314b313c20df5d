"""Which hosts and addresses a download may go to."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urlsplit

from kore.errors import KoreError

_DEFAULT_PORTS = {"http": 80, "https": 443}

_PRIVATE_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's host agent, reachable from its virtual machines only
        "169.254.0.0/16",  # link-local, instance metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved and broadcast
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, ORCHID, benchmarks and other special uses
        "2001:db8::/32",  # documentation
        "3fff::/20",
    )
)
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)

_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
# What a URL may hold as it is; anything else is percent-encoded before it is sent.
_SAFE = "%/:=&?~#+!$,;'@()*[]-._"
_NEVER = re.compile(r'[\x00-\x20\x7f\\<>"\ud800-\udfff]')
_BRACKETS = re.compile(r"\[[0-9a-fA-F:.]+\](:[0-9]*)?")
_PATTERN = re.compile(
    r"(\[?(?P<v6>[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f.]*)\]?|(?P<host>[^:\[\]/@]+))"  # ::1, [::1] or example.org
    r"(:(?P<port>[0-9]{1,5}))?"
)


class Refused(KoreError):
    """The rules of the download forbid this URL or address, whatever is behind it."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host of the open Internet.

    Private, loopback, link-local, carrier-grade NAT, multicast, reserved and documentation ranges do not, nor do IPv6
    addresses that carry such an IPv4 address (mapped, 6to4, NAT64, ISATAP), nor anything that is not an address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _PRIVATE_V4)
    if ip.scope_id is not None:
        return False
    low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.ipv4_mapped is not None or ip in _NAT64:
        return is_public(str(low))
    if ip not in _GLOBAL_V6 or any(ip in network for network in _PRIVATE_V6):
        return False
    if ip in _SIX_TO_FOUR and not is_public(str(ipaddress.IPv4Address(int(ip) >> 80 & 0xFFFFFFFF))):
        return False
    return not (int(ip) >> 32 & 0xFFFFFFFF in _ISATAP and not is_public(str(low)))


def redact(url: str) -> str:
    """The URL for messages: without user, password, fragment and query, where keys are kept."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "(a malformed URL)"
    host = f"[{host}]" if ":" in host else host
    query = "?…" if parts.query else ""
    text = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}{query}"
    return "".join(letter for letter in text if letter.isprintable())[:300]


@dataclass(frozen=True)
class Target:
    """A URL that the rules allow, in the parts a connection needs; ``path`` includes the query."""

    url: str
    scheme: str
    host: str
    port: int
    path: str


@dataclass(frozen=True)
class _Pattern:
    """An entry of an allowlist: a host, ``*.`` and a domain, or ``*``; and a port beside the usual ones."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> _Pattern:
        match = _PATTERN.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError("malformed")
        host, port = match["v6"] or match["host"], int(match["port"]) if match["port"] else None
        if port is not None and not 0 < port < 65536:
            raise ValueError("no such port")
        if ":" in host:
            return cls(str(ipaddress.IPv6Address(host)), port)
        star = "*." if host.startswith("*.") else ""
        return cls("*" if host == "*" else star + _plain_host(host[len(star) :]), port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    def fits(self, host: str, port: int, usual: int) -> bool:
        below = self.host.startswith("*.") and host.endswith(self.host[1:])
        return (self.host in ("*", host) or below) and port in (self.port, usual)


@dataclass(frozen=True)
class Allowlist:
    """The hosts that downloads may go to.

    Attributes:
        hosts: ``"example.org"`` (that host alone), ``"*.example.org"`` (every host below it), or ``"*"`` (any host with
            a public address). With ``:port`` behind it, that port too; otherwise only 80 and 443.
        allow_private: Also hosts with private addresses: for a server of one's own, and for tests.
    """

    hosts: tuple[str, ...]
    allow_private: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.hosts, str):
            raise KoreError(f"hosts: expected a list of host names, got the text {self.hosts!r}")
        hosts = []
        for pattern in self.hosts:
            try:
                hosts.append(str(_Pattern.parse(pattern)))
            except ValueError:
                raise KoreError(
                    f"host {pattern!r}: expected a host such as example.org, *.example.org or *, not a URL"
                ) from None
        object.__setattr__(self, "hosts", tuple(hosts))

    def allows(self, host: str, port: int, scheme: str) -> bool:
        """Whether a connection to this host and port may be made."""
        return any(_Pattern.parse(pattern).fits(host, port, _DEFAULT_PORTS[scheme]) for pattern in self.hosts)


def _plain_host(name: str) -> str:
    """A host name in lower-case ASCII without a dot at its end. Raises ValueError where it is malformed."""
    host = name.encode("idna").decode("ascii").lower().removesuffix(".")
    if not _HOST.fullmatch(host):
        raise ValueError("malformed")
    return host


def _split(url: str) -> tuple[SplitResult, str, int | None]:
    """The parts of a URL, its host and its port. Raises ValueError where it is malformed."""
    parts = urlsplit(url)
    if "[" in parts.netloc and not _BRACKETS.fullmatch(parts.netloc.rpartition("@")[2]):
        raise ValueError("malformed")
    host = parts.hostname or ""
    # A zone, as in fe80::1%eth0, names an interface of this machine.
    host = str(ipaddress.IPv6Address(host)) if ":" in host else _plain_host(host)
    return parts, host, parts.port


def check_url(url: str, allow: Allowlist) -> Target:
    """The parts of a URL that the allowlist admits.

    Raises:
        Refused: It is malformed, not http or https, carries a user or password, or goes to a host or port that is not
            listed.
    """
    shown = redact(url)
    scheme = url.partition(":")[0].lower()
    if scheme not in _DEFAULT_PORTS:
        got = repr(scheme) if ":" in url and scheme.isalnum() else "no scheme"
        raise Refused(f"{shown}: expected http:// or https://, got {got[:20]}")
    try:
        if len(url) > 8192 or _NEVER.search(url):
            raise ValueError("malformed")
        parts, host, port = _split(url)
    except ValueError:
        # Its own words could hold a password.
        raise Refused(f"{shown}: not a well-formed URL, or a malformed host name or port") from None
    port = _DEFAULT_PORTS[scheme] if port is None else port
    if parts.username is not None or parts.password is not None:
        raise Refused(f"{shown}: a URL with a user name or password is not fetched")
    if not allow.allows(host, port, scheme):
        listed = ", ".join(allow.hosts) or "none"
        raise Refused(f"{shown}: {host}, port {port}, is not on the list of allowed hosts ({listed}); add it to allow")
    path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    return Target(url, scheme, host, port, path)
