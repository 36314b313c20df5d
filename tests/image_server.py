"""A web server on loopback whose pages a test writes, and pictures to serve."""

from __future__ import annotations

import contextlib
import http.server
import io
import ssl
import threading

from PIL import Image

from kore.fetch import Allowlist, Downloader, DownloadLimits

QUICK = DownloadLimits(timeout=2.0, read_timeout=0.5, delay=0.0, backoff=0.01, max_bytes=200_000)


def picture(kind: str = "JPEG", size: tuple[int, int] = (60, 40), colour="red", **options) -> bytes:
    """A picture of one colour with a blue corner, in a file format."""
    image = Image.new("RGB", size, colour)
    image.paste("blue", (0, 0, size[0] // 3, size[1] // 2))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int = 200, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        """A whole response; header names with underscores for hyphens, ``length`` in place of the body's own."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path.partition("?")[0])
        with contextlib.suppress(OSError):
            if page is None:
                self.answer(404, b"nothing here")
            elif callable(page):
                page(self)
            else:
                self.answer(body=page)


class ImageServer(http.server.ThreadingHTTPServer):
    """``pages`` maps paths to bytes or to functions of the handler; ``asked`` collects (path, headers)."""

    daemon_threads = True
    # Threads of slow pages are not waited for.
    block_on_close = False

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict = {}
        self.asked: list = []
        self.port = self.server_address[1]
        self.scheme = "https" if context else "http"
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request, client_address):
        pass

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def downloader(self, limits: DownloadLimits = QUICK, **options) -> Downloader:
        """A downloader that may reach this server."""
        return Downloader(Allowlist((f"127.0.0.1:{self.port}",), allow_private=True), limits, **options)


@contextlib.contextmanager
def image_server(context: ssl.SSLContext | None = None):
    """A running server."""
    server = ImageServer(context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
