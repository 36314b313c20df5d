"""One HTTP exchange with an address that was checked before, within a given time.

The connection goes to the address itself, so no second name look-up can lead it elsewhere; proxies of the environment
are not used, since they would look the name up again. TLS is verified against the host name.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any

from kore.fetch.addresses import Target


class Deadline:
    """Time left in all and for each operation on a socket."""

    def __init__(self, total: float, each: float) -> None:
        self._end, self._each = time.monotonic() + total, each

    def left(self) -> float:
        """Seconds that the next operation may take.

        Raises:
            TimeoutError: None are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the total time is over")
        return min(left, self._each)


class _Reader(io.RawIOBase):
    """The receiving side of a socket; every single read keeps to the deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.left())
        return self._sock.recv_into(buffer)


class _Socket:
    """What http.client needs of a socket."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def makefile(self, mode: str, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._deadline))

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)

    def close(self) -> None:
        """Nothing: the exchange closes the socket when its body has been read."""


class Exchange:
    """A request sent and its response's head read; a context manager that closes the connection."""

    def __init__(
        self,
        target: Target,
        address: str,
        headers: Mapping[str, str],
        deadline: Deadline,
        context: ssl.SSLContext | None,
    ) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(deadline.left())
            self._sock.connect((address, target.port))
            if target.scheme == "https":
                self._sock.settimeout(deadline.left())
                assert context is not None, "https needs a context"
                self._sock = context.wrap_socket(self._sock, server_hostname=target.host)
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = _Socket(self._sock, deadline)  # type: ignore[assignment]
            connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
            host = f"[{target.host}]" if ":" in target.host else target.host
            default = target.port == (443 if target.scheme == "https" else 80)
            connection.putheader("Host", host if default else f"{host}:{target.port}")
            for name, value in {**headers, "Accept-Encoding": "identity", "Connection": "close"}.items():
                connection.putheader(name, value)
            connection.endheaders()
            self._response = connection.getresponse()
        except BaseException:
            self._sock.close()
            raise
        self.status: int = self._response.status
        self.length: int | None = self._response.length
        """Bytes of the body, where the server says it."""
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._sock.close()

    def read(self) -> bytes:
        """Some more of the body, ``b""`` at its end.

        Raises:
            http.client.HTTPException: The body ended before the length that was announced.
        """
        part = self._response.read1(1 << 16)
        if not part and self._response.length:
            raise http.client.IncompleteRead(b"", self._response.length)
        return part
