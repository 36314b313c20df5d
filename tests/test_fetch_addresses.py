"""Which hosts and addresses a download may go to."""

from __future__ import annotations

import pytest

from kore.errors import KoreError
from kore.fetch import Allowlist, Refused, is_public, redact
from kore.fetch.addresses import check_url

PRIVATE = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1
172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1
239.1.1.1 240.0.0.1 255.255.255.255 168.63.129.16 :: ::1 ::10.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254
64:ff9b::10.0.0.1 64:ff9b:1::8.8.8.8 100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:c0a8:101:: 3fff::1 5f00::1
2606:4700::1%eth0 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 2606:4700::5efe:10.0.0.1
2606:4700:0:0:200:5efe:7f00:1 localhost 127.1 0x7f.0.0.1 2130706433 1.2.3.4.5
"""
PUBLIC = """
1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.167.1.1 198.17.255.255 223.255.255.255
2606:4700:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1 2606:4700::5efe:8.8.8.8
"""


def test_addresses_that_are_not_of_the_open_internet():
    assert [address for address in PRIVATE.split() if is_public(address)] == []


def test_addresses_of_the_open_internet():
    assert [address for address in PUBLIC.split() if not is_public(address)] == []


def test_hosts_are_matched_exactly_or_below_a_star():
    allow = Allowlist(("Example.org", "*.wiki.net", "img.test:8080"))
    good = ["https://example.org/a", "http://EXAMPLE.org./a", "https://a.wiki.net/", "https://a.b.wiki.net/"]
    for url in [*good, "http://img.test:8080/", "https://img.test/"]:
        check_url(url, allow)
    bad = ["https://www.example.org/", "https://wiki.net/", "https://evilwiki.net/", "https://example.org.evil.net/"]
    for url in [*bad, "https://example.org:8080/", "http://example.org:443/", "http://img.test:8081/"]:
        with pytest.raises(Refused, match="not on the list of allowed hosts"):
            check_url(url, allow)


def test_a_star_is_any_host_on_the_usual_ports():
    check_url("https://anything.at.all/", Allowlist(("*",)))
    with pytest.raises(Refused):
        check_url("https://anything.at.all:22/", Allowlist(("*",)))
    with pytest.raises(Refused, match="none"):
        check_url("https://example.org/", Allowlist(()))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/a",
        "file:///etc/passwd",
        "//example.org/a",
        "https://user:secret@example.org/",
        "https://secret@example.org/",
        "https://example.org/a b",
        "https://example.org/\r\nHost: evil",
        "https://example.org\\@evil.net/",
        "https:///a",
        "https://exa mple.org/",
        "https://[::1/",
        "https://example.org:99999/",
        "https://-/",
        "https://" + "a" * 64 + ".org/",
    ],
)
def test_urls_that_are_never_fetched(url):
    with pytest.raises(Refused) as caught:
        check_url(url, Allowlist(("*", "example.org")))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_target_is_plain_ascii():
    target = check_url("https://bücher.example/Straße?q=ä%20b#part", Allowlist(("*",)))
    assert (target.host, target.port) == ("xn--bcher-kva.example", 443)
    assert target.path == "/Stra%C3%9Fe?q=%C3%A4%20b"


@pytest.mark.parametrize(
    "pattern", ["https://example.org", "*example.org", "a.*.org", "exa mple.org", "", "example.org/a"]
)
def test_malformed_patterns(pattern):
    with pytest.raises(KoreError, match="expected a host such as"):
        Allowlist((pattern,))


def test_an_allowlist_is_not_one_text():
    with pytest.raises(KoreError, match="expected a list"):
        Allowlist("example.org")  # type: ignore[arg-type]


def test_urls_in_messages_hold_no_query():
    shown = redact("https://u:pw@Example.org:8443/search?key=SECRET&q=a+b&flag#SECRET")
    assert shown == "https://example.org:8443/search?…"
    assert "SECRET" not in redact("https://example.org/?SECRET")
    assert redact("https://[bad/?key=SECRET") == "(a malformed URL)"


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@ex\u2100mple.org/",
        "https://user:secret/@example.org/",
        "https://example.org:secret/",
        "https://[fe80::1%25secret]/",
        "https://[v1.a]/",
        "https://[::1]x/",
        "https://example.org../",
        "https://example.org/\ud800",
        "https://example.org:0/",
        "data:image/png;base64,secret",
        "javascript:secret()",
        "https://example.org/" + "a" * 9000,
    ],
)
def test_malformed_urls_are_refused_and_not_quoted(url):
    with pytest.raises(Refused) as caught:
        check_url(url, Allowlist(("*",)))
    assert "secret" not in str(caught.value).replace("secret()", "").partition(": ")[2]
    str(caught.value).encode()


def test_patterns_are_compared_as_hosts_are_written():
    allow = Allowlist(("Bücher.example", "EXAMPLE.org.:8080", "[0:0::1]:81", "*.Wiki.net."))
    assert allow.hosts == ("xn--bcher-kva.example", "example.org:8080", "[::1]:81", "*.wiki.net")
    assert Allowlist(allow.hosts) == allow
    for url in ("https://bücher.example/", "http://example.org.:8080/", "http://[::1]:81/", "http://[0::1]/"):
        check_url(url, allow)
    check_url("https://例え.wiki.net/", allow)
    for wrong in ("example.org:0", "example.org:99999", "example.org:²", "[fe80::1%eth0]", "a b", "user@example.org"):
        with pytest.raises(KoreError, match="expected a host such as"):
            Allowlist((wrong,))
