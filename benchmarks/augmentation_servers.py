"""Servers on loopback for ``benchmarks.augmentation_faults``: a chat model, and an image search with its images.

    python -m benchmarks.augmentation_servers FOLDER

writes ``FOLDER/servers.json`` with the addresses as soon as they listen, and what every request met to
``FOLDER/requests.jsonl``. While ``FOLDER/faults`` exists a request fails once or twice before it succeeds, each time in
another way. What the images of a search are, broken and forbidden ones among them, does not depend on that.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kore.artifacts import atomic_write
from kore.augmentation.images.words import WordIndex

EXAMPLE = Path(__file__).parent.parent / "examples" / "knowledge"
ANSWERS = Path(__file__).with_name("augmentation_answers.json")
OWN, INSIDE = "127.0.0.2", "127.0.0.1"
"""The servers' address, and one that stands for what lies inside a network: whatever asks there is noted."""
PICTURES, FORBIDDEN, ELSEWHERE = "pictures.test", "inside.test", "elsewhere.test"
NAMES = {PICTURES: OWN, ELSEWHERE: OWN, FORBIDDEN: INSIDE}
KEYS = {"OPENAI_API_KEY": "sk-sentinel-1f83a90c7b", "SERPAPI_API_KEY": "serp-sentinel-5be0cd19aa"}
HANG = 7.0
"""Seconds of silence; more than the time-outs that the benchmark sets."""
FALSE_ROUND = {"question": "Who paid for all of this?", "answer": "King Zog of Ruritania paid 77 million ducats."}

_TASKS = {"rounds": "dialogue", "depicted": "caption", "questions": "vqa"}
_CHAT_FAULTS = ("500", "503", "429", "silence", "cut", "broken protocol", "page", "broken words")
_PICTURE_FAULTS = ("500", "429", "silence", "cut")
_BAD = ("truncated", "bomb", "to an inner name", "to an inner address", "to another host", "page", "missing")
Fault = str | None


class Log:
    """Counts how often each thing was asked for, and notes what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock, self._times = threading.Lock(), Counter[str]()
        self._file = (folder / "requests.jsonl").open("a", encoding="utf-8")

    def fault(self, name: str, kinds: tuple[str, ...], most: int) -> Fault:
        """What this request meets: for each name its own sequence of at most so many faults, then none."""
        if not (self.folder / "faults").exists():
            return None
        number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        with self._lock:
            times = self._times[name]
            self._times[name] += 1
        return kinds[(number // 7 + 3 * times) % len(kinds)] if times < number % (most + 1) else None

    def note(self, server: str, what: str, fault: Fault = None) -> None:
        with self._lock:
            self._file.write(json.dumps({"server": server, "what": what, "fault": fault}) + "\n")
            self._file.flush()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log: Log
    ports: dict[str, int]

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: bytes, status: int = 200, kind: str = "application/json", cut: bool = False, **headers: str):
        """A whole answer, or with ``cut`` the first half of one that is announced whole."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def meet(self, fault: Fault, body: bytes, kind: str, secret: str) -> None:
        """Answer with a fault, or well. Errors repeat the key, as some servers do."""
        error = json.dumps({"error": {"message": f"scripted fault for {secret}"}}).encode()
        if fault is None:
            self.send(body, kind=kind)
        elif fault == "silence":
            time.sleep(HANG)
            self.close_connection = True
        elif fault == "cut":
            self.send(body, kind=kind, cut=True)
        elif fault == "page":
            self.send(b"<html>Bad Gateway</html>", 502, "text/html")
        elif fault == "broken protocol":
            self.send(b'{"choices": [')
        else:
            self.send(error, int(fault), Retry_After="0.2" if fault == "429" else "0")


class Chat(Handler):
    """A chat model that has answers for the example, and adds an untrue round to every first dialogue."""

    answers: dict[str, dict[str, Any]]
    texts: dict[str, str]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "")
        if key != f"Bearer {KEYS['OPENAI_API_KEY']}":
            self.log.note("chat", "wrong key")
            return self.send(json.dumps({"error": {"message": f"wrong key {key}"}}).encode(), 401)
        time.sleep(0.1)
        words = "\n".join(message["content"] for message in request["messages"])
        item = next(name for name, text in self.texts.items() if text in words)
        properties = request["response_format"]["json_schema"]["schema"]["properties"]
        task = next(task for name, task in _TASKS.items() if name in properties)
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        first = not any(message["role"] == "assistant" for message in request["messages"])
        fault = self.log.fault(name, _CHAT_FAULTS if first else _CHAT_FAULTS[:-1], 2)
        self.log.note("chat", f"{item} {task}", fault)
        content = self.answers[item][task]
        if task == "dialogue" and first:
            content = {"rounds": [*content["rounds"], FALSE_ROUND]}
        said = json.dumps(content, ensure_ascii=False)
        if fault == "broken words":
            fault, said = None, said[: len(said) // 2]
        usage = {"prompt_tokens": len(words) // 4, "completion_tokens": len(said) // 4}
        answer = {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
        return self.meet(fault, json.dumps(answer).encode(), "application/json", key)


class Pictures(Handler):
    """SerpApi's image search over the example's pictures, the pictures themselves, and bad ones among the results."""

    rows: list[dict[str, str]]
    index: WordIndex
    bad: dict[str, Callable[[Pictures], None]]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        secret = parse_qs(parts.query).get("api_key", [""])[0]
        fault = self.log.fault(self.path, (*_PICTURE_FAULTS, *(("broken protocol",) if secret else ())), 1)
        server = "elsewhere" if self.headers.get("Host", "").startswith(ELSEWHERE) else "pictures"
        self.log.note(server, parts.path if not secret else "search", fault)
        if parts.path == "/search.json":
            if secret != KEYS["SERPAPI_API_KEY"]:
                return self.send(json.dumps({"error": f"wrong key {secret}"}).encode(), 401)
            found = self.search(parse_qs(parts.query)["q"][0])
            return self.meet(fault, json.dumps({"images_results": found}).encode(), "application/json", secret)
        name = parts.path.removeprefix("/pictures/")
        if name in {row["file_name"] for row in self.rows}:
            return self.meet(fault, (EXAMPLE / "pictures" / name).read_bytes(), "image/jpeg", "")
        kind = parts.path.removeprefix("/bad/").partition("/")[0].replace("-", " ")
        return self.bad[kind](self) if kind in self.bad else self.send(b"nothing here", 404, "text/plain")

    def search(self, query: str) -> list[dict[str, str]]:
        """Two bad images, other ones for each query, before what fits."""
        place = f"http://{PICTURES}:{self.ports['pictures']}"
        number = zlib.crc32(query.encode())
        kinds = [_BAD[(number + step) % len(_BAD)] for step in (0, 3)]
        bad = [{"original": f"{place}/bad/{kind.replace(' ', '-')}/{number}", "title": kind} for kind in kinds]
        good = [
            {
                "original": f"{place}/pictures/{row['file_name']}",
                "title": row["text"],
                "link": row["page"],
                "source": row["author"],
                "license_details_url": row["licence"],
            }
            for row in (self.rows[found] for found in self.index.search(query))
        ]
        return [*bad, *good]


class Inner(Handler):
    """What no download may reach."""

    def do_GET(self) -> None:
        self.log.note("inner", self.path)
        self.send(b"inner", kind="text/plain")


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in some fifty kilobytes, which decodes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def bad_pictures(ports: dict[str, int]) -> dict[str, Callable[[Pictures], None]]:
    """What is behind the bad results."""
    half = (EXAMPLE / "pictures" / "cat-face.jpg").read_bytes()
    half, large = half[: len(half) // 2], bomb()
    there = {
        "to an inner name": f"http://{FORBIDDEN}:{ports['inner']}/secret.jpg",
        "to an inner address": f"http://{INSIDE}:{ports['inner']}/secret.jpg",
        "to another host": f"http://{ELSEWHERE}:{ports['pictures']}/pictures/cat-face.jpg",
    }
    redirects = {kind: lambda handler, url=url: handler.send(b"", 302, Location=url) for kind, url in there.items()}
    return {
        **redirects,
        "truncated": lambda handler: handler.send(half, kind="image/jpeg"),
        "bomb": lambda handler: handler.send(large, kind="image/png"),
        "page": lambda handler: handler.send(b"<html>Sign in to see this</html>", kind="text/html"),
        "missing": lambda handler: handler.send(b"gone", 404, "text/plain"),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    log = Log(folder)
    rows = [json.loads(line) for line in (EXAMPLE / "pictures" / "metadata.jsonl").read_text("utf-8").splitlines()]
    items = [json.loads(line) for line in (EXAMPLE / "knowledge.jsonl").read_text("utf-8").splitlines()]
    servers = {
        name: http.server.ThreadingHTTPServer((address, 0), handler)
        for name, address, handler in (("chat", OWN, Chat), ("pictures", OWN, Pictures), ("inner", INSIDE, Inner))
    }
    ports = {name: server.server_address[1] for name, server in servers.items()}
    Handler.log, Handler.ports = log, ports
    Chat.answers = json.loads(ANSWERS.read_text("utf-8"))
    Chat.texts = {item["id"]: item["text"] for item in items}
    Pictures.rows, Pictures.index = rows, WordIndex([f"{row['file_name']} {row['text']}" for row in rows])
    Pictures.bad = bad_pictures(ports)
    threads = []
    for server in servers.values():
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threads.append(threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}))
        threads[-1].start()
    atomic_write(folder / "servers.json", json.dumps(ports))


if __name__ == "__main__":
    main()
