"""Downloads from a faulty server: what is refused, what is repeated, what never reaches a message."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import subprocess
import time
from dataclasses import replace

import pytest

from kore.errors import KoreError, Unavailable
from kore.fetch import Allowlist, Answered, Downloader, DownloadLimits, Refused, Unfit, download, download_json
from kore.fetch.pacing import Pacer
from tests.image_server import QUICK, image_server, picture


@pytest.fixture
def server():
    with image_server() as running:
        yield running


def test_an_image_is_known_by_its_bytes(server):
    server.pages["/a"] = lambda handler: handler.answer(body=picture(), Content_Type="text/html")
    got = server.downloader(contact="me@example.org").image(server.url("/a?x=1"))
    assert got.body == picture() and got.headers["content-type"] == "text/html"
    path, headers = server.asked[0]
    assert path == "/a?x=1" and headers["Host"] == f"127.0.0.1:{server.port}"
    assert headers["User-Agent"].startswith("kore-lmm/") and "me@example.org" in headers["User-Agent"]
    assert headers["Accept-Encoding"] == "identity" and "Referer" not in headers


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"", "an empty answer"),
        (b"BM" + b"\0" * 400, "something else"),
    ],
)
def test_what_is_no_image(server, body, said):
    server.pages["/a"] = lambda handler: handler.answer(body=body, Content_Type="image/jpeg")
    with pytest.raises(KoreError, match=f"expected a JPEG, PNG, WebP or GIF image, got {said}"):
        server.downloader().image(server.url("/a"))
    assert len(server.asked) == 1


def test_what_is_no_image_is_not_read_to_its_end(server):
    def page(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(b"<!doctype html>" + b" " * 300)
        handler.wfile.flush()
        time.sleep(1.0)

    server.pages["/a"] = page
    with pytest.raises(Unfit, match="an HTML page"):
        server.downloader().image(server.url("/a"))


def test_loopback_is_refused_unless_it_is_asked_for(server):
    server.pages["/a"] = picture()
    with pytest.raises(Refused, match="not a public address"):
        Downloader(Allowlist((f"127.0.0.1:{server.port}",)), QUICK).image(server.url("/a"))
    with pytest.raises(Refused, match="not a public address"):
        Downloader(Allowlist((f"localhost:{server.port}",)), QUICK).image(server.url("/a", "localhost"))
    assert server.asked == []


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::1", "10.1.2.3", "::ffff:10.1.2.3"])
def test_one_private_address_of_a_name_is_enough_to_refuse(address):
    for addresses in (["93.184.215.14", address], [address, "93.184.215.14"]):
        downloader = Downloader(Allowlist(("*",)), QUICK, resolve=lambda host, port, found=addresses: found)
        with pytest.raises(Refused, match=f"pictures.example is at {address}"):
            downloader.image("https://pictures.example/a.jpg")


def test_a_name_is_looked_up_once_and_the_connection_goes_to_what_was_checked(server, monkeypatch):
    asked = []

    def resolve(host, port):
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a second look-up"))
    server.pages["/a"] = picture()
    allow = Allowlist((f"pictures.example:{server.port}",), allow_private=True)
    got = Downloader(allow, QUICK, resolve=resolve).image(server.url("/a", "pictures.example"))
    assert got.body == picture() and asked == ["pictures.example"]
    assert server.asked[0][1]["Host"] == f"pictures.example:{server.port}"


def test_another_address_is_tried_when_the_first_does_not_answer(server):
    server.pages["/a"] = picture()
    allow = Allowlist((f"pictures.example:{server.port}",), allow_private=True)
    downloader = Downloader(allow, QUICK, resolve=lambda host, port: ["::1", "127.0.0.1"])
    assert downloader.image(server.url("/a", "pictures.example")).body == picture()


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/a",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/a",
        "http://inside.example/a",
        "http://0x7f000001/a",
        "http://2130706433/a",
        "file:///etc/passwd",
        "ftp://public.example/a",
        "http://public.example:22/",
        "http://user:pw@public.example/",
        "//inside.example/a",
        "http://[bad/",
    ],
)
def test_redirects_are_checked_like_first_urls(server, location):
    names = {"public.example": ["127.0.0.1"], "inside.example": ["10.0.0.7"]}

    class Narrow(Downloader):
        """Trusts the one server of the test and nothing else on loopback."""

        def _addresses(self, target):
            if target.host == "public.example" and target.port == server.port:
                return ["127.0.0.1"]
            return super()._addresses(target)

    server.pages["/go"] = lambda handler: handler.answer(302, Location=location)
    allow = Allowlist(("*", f"public.example:{server.port}"))
    downloader = Narrow(allow, QUICK, resolve=lambda host, port: names.get(host) or _numeric(host))
    with pytest.raises(Refused):
        downloader.image(server.url("/go", "public.example"))
    assert [path for path, _ in server.asked] == ["/go"]


def _numeric(host):
    return [entry[4][0] for entry in socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)]


def test_redirects_to_hosts_that_are_not_listed(server):
    server.pages["/go"] = lambda handler: handler.answer(301, Location="http://elsewhere.example/a")
    with pytest.raises(Refused, match=r"elsewhere\.example.*not on the list"):
        server.downloader().image(server.url("/go"))


def test_a_short_chain_of_redirects_arrives(server):
    server.pages["/1"] = lambda handler: handler.answer(302, Location="/2?x=1")
    server.pages["/2"] = lambda handler: handler.answer(308, Location=server.url("/3"))
    server.pages["/3"] = picture()
    got = server.downloader().image(server.url("/1"))
    assert got.url == server.url("/3") and got.body == picture()


def test_redirect_loops_end(server):
    server.pages["/1"] = lambda handler: handler.answer(302, Location="/2")
    server.pages["/2"] = lambda handler: handler.answer(302, Location="/1")
    with pytest.raises(KoreError, match="does not arrive"):
        server.downloader().image(server.url("/1"))
    assert len(server.asked) == 2


def test_endless_redirects_end(server):
    class Endless(dict):
        def get(self, path, default=None):
            return lambda handler: handler.answer(302, Location=f"/x{len(server.asked)}")

    server.pages = Endless()
    with pytest.raises(KoreError, match="redirects 5 times"):
        server.downloader(replace(QUICK, max_redirects=4)).image(server.url("/a"))
    assert len(server.asked) == 5


def test_too_large_by_its_own_word(server):
    server.pages["/a"] = lambda handler: handler.answer(body=picture(), length=10**9)
    with pytest.raises(KoreError, match="1000000000 bytes; the limit is 200000"):
        server.downloader().image(server.url("/a"))


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_without_a_length(server, chunked):
    sent = []

    def page(handler):
        handler.send_response(200)
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.send_header("Connection", "close")
        handler.end_headers()
        part = picture() + b"\0" * 50_000
        for _ in range(1000):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            sent.append(len(part))

    server.pages["/a"] = page
    with pytest.raises(KoreError, match="more than 200000 bytes"):
        server.downloader().image(server.url("/a"))
    assert sum(sent) < 30_000_000


def test_chunked_bodies_arrive_whole(server):
    def page(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        body = picture()
        for start in range(0, len(body), 100):
            part = body[start : start + 100]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    server.pages["/a"] = page
    assert server.downloader().image(server.url("/a")).body == picture()


def test_compressed_bodies_are_refused(server):
    bomb = gzip.compress(b"\0" * 10_000_000)
    server.pages["/a"] = lambda handler: handler.answer(body=bomb, Content_Encoding="gzip")
    with pytest.raises(KoreError, match="its content is encoded"):
        server.downloader().get(server.url("/a"))


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_slow_drip_ends(server, where):
    def page(handler):
        if where == "body":
            handler.send_response(200)
            handler.end_headers()
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Pad: 1\r\n" * 1000 if where == "head" else picture() * 100:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.02)

    server.pages["/a"] = page
    start = time.monotonic()
    limits = replace(QUICK, timeout=0.4, read_timeout=0.3, attempts=1)
    with pytest.raises(Unavailable, match="no whole answer in time"):
        server.downloader(limits).image(server.url("/a"))
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(("total", "each"), [(5.0, 0.1), (0.1, 5.0)])
def test_a_silent_server_is_left(server, total, each):
    server.pages["/a"] = lambda handler: time.sleep(1.0)
    start = time.monotonic()
    with pytest.raises(Unavailable, match=f"{each:g} s a read, {total:g} s in all"):
        server.downloader(replace(QUICK, timeout=total, read_timeout=each, attempts=1)).get(server.url("/a"))
    assert time.monotonic() - start < 0.8


def test_a_body_cut_short_is_asked_for_again(server):
    body = picture()

    def page(handler):
        handler.answer(body=body[:300] if len(server.asked) < 3 else body, length=len(body))

    server.pages["/a"] = page
    assert server.downloader().image(server.url("/a")).body == body
    assert len(server.asked) == 3


def test_lasting_answers_are_not_repeated(server):
    for status in (400, 401, 403, 404, 410):
        server.pages["/a"] = lambda handler, status=status: handler.answer(status, b"no")
        before = len(server.asked)
        with pytest.raises(Answered, match=f"answers {status}") as caught:
            server.downloader().image(server.url("/a"))
        assert not isinstance(caught.value, Unavailable) and caught.value.status == status
        assert len(server.asked) == before + 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_answers_are_repeated_a_few_times(server, status):
    server.pages["/a"] = lambda handler: handler.answer(status)
    with pytest.raises(Unavailable, match=f"answers {status}"):
        server.downloader().image(server.url("/a"))
    assert len(server.asked) == QUICK.attempts


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    allow = Allowlist((f"127.0.0.1:{port}",), allow_private=True)
    with pytest.raises(Unavailable, match="the connection failed"):
        Downloader(allow, QUICK).get(f"http://127.0.0.1:{port}/?key=SECRET")


@pytest.fixture
def tenth(monkeypatch):
    """Silences that servers ask for take a tenth of their time."""
    block = Pacer.block
    monkeypatch.setattr(Pacer, "block", lambda self, host, seconds: block(self, host, seconds / 10))


def test_retry_after_is_waited_for(server, tenth):
    def page(handler):
        if len(server.asked) == 1:
            handler.answer(429, Retry_After="2")
        else:
            handler.answer(body=picture())

    server.pages["/a"] = page
    start = time.monotonic()
    server.downloader().image(server.url("/a"))
    assert 0.19 < time.monotonic() - start < 0.9


def test_a_long_retry_after_is_not_waited_for_and_not_broken(server):
    server.pages["/a"] = lambda handler: handler.answer(503, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")
    server.pages["/b"] = picture()
    downloader = server.downloader()
    with pytest.raises(Unavailable, match="asks to be left alone"):
        downloader.image(server.url("/a"))
    with pytest.raises(Unavailable, match="asks to be left alone"):
        downloader.image(server.url("/b"))
    assert len(server.asked) == 1


def test_hosts_are_asked_at_a_pace(monkeypatch):
    clock, slept, interrupt = [100.0], [], []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds
        if interrupt:
            interrupt.pop()()

    monkeypatch.setattr("kore.fetch.pacing.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("kore.fetch.pacing.time.sleep", sleep)
    pacer = Pacer()
    for host in ("a", "a", "b", "a"):
        assert pacer.wait(host, 2.0, 60.0) == 0
    assert slept == [0.0, 2.0, 0.0, 2.0]
    pacer.block("b", 30.0)
    assert pacer.wait("b", 2.0, 20.0) == 30.0 and slept[-1] == 2.0
    assert pacer.wait("b", 2.0, 60.0) == 0 and slept[-1] == 30.0
    interrupt.append(lambda: pacer.block("b", 10.0))
    assert pacer.wait("b", 2.0, 60.0) == 0 and slept[-2:] == [2.0, 10.0]
    interrupt.append(lambda: pacer.block("b", 99.0))
    assert pacer.wait("b", 2.0, 60.0) == 99.0 and slept[-1] == 2.0


@pytest.mark.parametrize("number", ["²", "5²", "9" * 5000, "-5", "0x10", ""])
def test_numbers_of_headers_that_are_none(server, number):
    def page(handler):
        handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {number}\r\n\r\n".encode("latin-1") + picture())
        handler.close_connection = True

    def busy(handler):
        handler.wfile.write(f"HTTP/1.1 503 No\r\nRetry-After: {number}\r\n\r\n".encode("latin-1"))
        handler.close_connection = True

    server.pages.update({"/a": page, "/b": busy})
    downloader = server.downloader(replace(QUICK, attempts=1))
    with contextlib.suppress(Unfit):
        assert downloader.image(server.url("/a")).body == picture()
    with pytest.raises(Unavailable, match="answers 503"):
        downloader.get(server.url("/b"))


def test_an_answer_that_asks_to_wait_is_asked_again(server, tenth):
    body = b'{"error": {"code": "maxlag", "info": "Waiting for 10.0.0.1: 7 seconds lagged"}}'

    def page(handler):
        if len(server.asked) == 1:
            handler.answer(body=body, Retry_After="2")
        else:
            handler.answer(body=b'{"query": {}}')

    server.pages["/api"] = page
    start = time.monotonic()
    assert server.downloader().json(server.url("/api")) == {"query": {}}
    assert len(server.asked) == 2 and time.monotonic() - start > 0.19
    server.pages["/api"] = lambda handler: handler.answer(body=body, Retry_After="99")
    with pytest.raises(Unavailable, match="7 seconds lagged"):
        server.downloader(replace(QUICK, max_wait=9)).json(server.url("/api"))


def test_other_threads_leave_an_overloaded_server_alone_too(server):
    server.pages["/a"] = lambda handler: handler.answer(429)
    downloader = server.downloader(replace(QUICK, attempts=1, backoff=30.0, max_wait=20.0))
    with pytest.raises(Unavailable, match="answers 429"):
        downloader.image(server.url("/a"))
    with pytest.raises(Unavailable, match="asks to be left alone for 30 s"):
        downloader.image(server.url("/a"))
    assert len(server.asked) == 1


@pytest.mark.parametrize("length", [10**9, 300_000])
def test_an_error_keeps_its_status_whatever_its_body(server, length):
    server.pages["/a"] = lambda handler: handler.answer(403, b"x" * 250_000, length=length)
    with pytest.raises(Answered, match="answers 403"):
        server.downloader().json(server.url("/a"))
    assert len(server.asked) == 1


def test_redirects_to_paths_that_are_not_ascii(server):
    server.pages["/go"] = lambda handler: handler.answer(302, Location="/b\u00fccher".encode().decode("latin-1"))
    server.pages["/b%C3%BCcher"] = picture()
    assert server.downloader().image(server.url("/go")).body == picture()


def test_proxies_of_the_environment_are_not_asked(server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.pages["/a"] = picture()
    assert server.downloader().image(server.url("/a")).body == picture()


def test_keys_of_the_query_reach_no_message(server, caplog):
    server.pages["/echo"] = lambda handler: handler.answer(403, b'{"error": {"message": "bad key SECRETKEY for cx"}}')
    server.pages["/text"] = b"not JSON"
    server.pages["/go"] = lambda handler: handler.answer(302, Location="http://elsewhere.example/?key=SECRETKEY")
    server.pages["/slow"] = lambda handler: time.sleep(0.3)
    downloader = server.downloader(replace(QUICK, attempts=1, read_timeout=0.1))
    messages = []
    for path in ("/echo", "/text", "/go", "/slow", "/missing"):
        with pytest.raises(KoreError) as caught:
            downloader.json(server.url(f"{path}?key=SECRETKEY&q=x"))
        messages.append(str(caught.value))
        error = caught.value
        while error is not None:
            assert "SECRETKEY" not in repr(error)
            error = None if error.__suppress_context__ else error.__context__
    assert "bad key … for cx" in messages[0]
    assert all("?…" in message for message in messages)
    assert "SECRETKEY" not in caplog.text and "SECRETKEY" not in repr(downloader)


def test_json_and_plain_functions(server):
    server.pages["/a"] = b'{"x": [1]}'
    allow, limits = Allowlist((f"127.0.0.1:{server.port}",), allow_private=True), DownloadLimits(delay=0)
    assert download_json(server.url("/a"), limits, allow) == {"x": [1]}
    assert download(server.url("/a"), limits, allow).body == b'{"x": [1]}'


@pytest.mark.parametrize("number", [socket.EAI_NONAME, socket.EAI_AGAIN])
def test_names_without_an_address(number):
    def nowhere(host, port):
        raise socket.gaierror(number, "unknown")

    with pytest.raises(Unavailable, match="has no address"):
        Downloader(Allowlist(("*",)), QUICK, resolve=nowhere).get("https://nowhere.example/")
    with pytest.raises(Unavailable, match="has no address"):
        Downloader(Allowlist(("*",)), QUICK, resolve=lambda host, port: []).get("https://nowhere.example/")


def test_answers_nested_without_end(server):
    server.pages["/a"] = b"[" * 150_000
    server.pages["/b"] = lambda handler: handler.answer(400, b"[" * 150_000)
    with pytest.raises(Unavailable, match="expected JSON"):
        server.downloader().json(server.url("/a"))
    with pytest.raises(Answered):
        server.downloader().json(server.url("/b"))


def test_a_contact_cannot_add_headers():
    with pytest.raises(KoreError, match="contact"):
        Downloader(Allowlist(("*",)), contact="me\r\nX-Evil: 1")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(file), "-days", "2", "-subj", "/CN=pictures.example"]
    command += ["-addext", "subjectAltName=DNS:pictures.example"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl makes no certificate here")
    return file, key


def test_tls_is_verified_against_the_host_name(certificate):
    file, key = certificate
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(file, key)
    trusting = ssl.create_default_context(cafile=str(file))
    with image_server(serving) as server:
        server.pages["/a"] = picture()
        server.pages["/down"] = lambda handler: handler.answer(302, Location="http://pictures.example/a")

        def fetch(host, context, path="/a"):
            allow = Allowlist((f"{host}:{server.port}", "*"), allow_private=True)
            options = {"resolve": lambda host, port: ["127.0.0.1"], "context": context}
            return Downloader(allow, QUICK, **options).image(server.url(path, host))

        assert fetch("pictures.example", trusting).body == picture()
        with pytest.raises(KoreError, match="certificate is not valid"):
            fetch("other.example", trusting)
        with pytest.raises(KoreError, match="certificate is not valid"):
            fetch("pictures.example", None)
        with pytest.raises(Refused, match="redirects from https"):
            fetch("pictures.example", trusting, "/down")
