"""How often one host is asked: one request at a time slot, and none before a Retry-After has passed."""

from __future__ import annotations

import threading
import time


class Pacer:
    """Time slots for each host, shared by the threads of a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}
        self._blocked: dict[str, float] = {}

    def wait(self, host: str, delay: float) -> None:
        """Sleep until the host may be asked, and take that slot; the next one is ``delay`` seconds later."""
        with self._lock:
            now = time.monotonic()
            slot = max(now, self._next.get(host, 0.0), self._blocked.get(host, 0.0))
            self._next[host] = slot + delay
        time.sleep(slot - now)

    def block(self, host: str, seconds: float) -> None:
        """Ask the host nothing for so long."""
        with self._lock:
            self._blocked[host] = max(self._blocked.get(host, 0.0), time.monotonic() + seconds)

    def blocked(self, host: str) -> float:
        """Seconds for which the host has asked for silence, 0 where it has not."""
        with self._lock:
            return max(0.0, self._blocked.get(host, 0.0) - time.monotonic())
