"""A server on loopback that speaks the chat-completions protocol from a script, with faults where the script says."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdef"


def read_no_certificates(monkeypatch: Any) -> None:
    """Clients read all certificates before their first request, which takes longer than most tests; nothing has one."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None, raising=False)


@dataclass(frozen=True)
class Fault:
    """What the server does in place of an answer.

    Attributes:
        status: HTTP status.
        error: The ``error`` object of the answer; some servers echo what they got, ``{key}`` stands for the key sent.
        headers: Further headers.
        hang: Say nothing until the server is closed, or this many seconds.
        truncate: Close the connection in the middle of a good answer.
        body: Send these bytes as JSON with the status.
        content: Answer well, with this as the model's words.
    """

    status: int = 200
    error: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: float = 0.0
    truncate: bool = False
    body: bytes | None = None
    content: str | None = None


class ScriptedServer:
    """Use as a context manager.

    Args:
        content: From the request's JSON, what the model says (a dict becomes JSON).
        faults: By number of the request, from 0; or a function of number and request.
        refuses: Names of parameters that are answered with 400, such as ``"response_format"``.
        usage: Whether tokens are counted (one per four characters).
    """

    def __init__(
        self,
        content: Callable[[dict[str, Any]], Any],
        faults: Mapping[int, Fault] | Callable[[int, dict[str, Any]], Fault | None] = {},  # noqa: B006
        refuses: tuple[str, ...] = (),
        usage: bool = True,
        key: str | None = KEY,
    ) -> None:
        self.content, self.faults, self.refuses, self.usage, self.key = content, faults, refuses, usage, key
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()

        class Handler(_Handler):
            script = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _receive(self, body: dict[str, Any], authorization: str) -> tuple[int, Fault | None]:
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.authorizations.append(authorization)
        fault = self.faults(number, body) if callable(self.faults) else self.faults.get(number)
        return number, fault


class _Handler(BaseHTTPRequestHandler):
    script: ScriptedServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        authorization = self.headers.get("Authorization", "")
        number, fault = script._receive(body, authorization)
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": f"nothing at {self.path}"}})
        if script.key is not None and authorization != f"Bearer {script.key}":
            return self._send(401, {"error": {"message": f"wrong key: {authorization}", "code": "invalid_api_key"}})
        refused = next((name for name in script.refuses if name in body), None)
        if fault is None and refused is not None:
            return self._send(400, {"error": {"message": f"unsupported parameter {refused}", "param": refused}})
        if fault is not None:
            if fault.hang:
                script._closing.wait(fault.hang)
                self.close_connection = True
                return None
            if fault.body is not None:
                return self._bytes(fault.status, fault.body, fault.headers)
            if fault.status != 200:
                error = fault.error or {"message": "scripted fault"}
                text = json.dumps({"error": error}).replace("{key}", script.key or "")
                return self._bytes(fault.status, text.encode(), fault.headers)
        content = fault.content if fault is not None and fault.content is not None else script.content(body)
        text = content if isinstance(content, str) else json.dumps(content)
        answer: dict[str, Any] = {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}},
            ],
        }
        if script.usage:
            prompt = sum(len(message["content"]) for message in body["messages"]) // 4
            answer["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": len(text) // 4,
                "total_tokens": prompt + len(text) // 4,
            }
        if fault is not None and fault.truncate:
            data = json.dumps(answer).encode()
            self._head(200, len(data), {})
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        return self._send(200, answer)

    def _send(self, status: int, answer: Any) -> None:
        self._bytes(status, json.dumps(answer).encode(), {})

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _bytes(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, len(data), headers)
        self.wfile.write(data)
