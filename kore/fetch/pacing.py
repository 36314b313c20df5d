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

    def wait(self, host: str, delay: float, longest: float) -> float:
        """Sleep until the host may be asked, and take that slot; the next one is ``delay`` seconds later.

        Returns:
            0, or the seconds for which the host has asked for silence where these are more than ``longest``: then it
            may not be asked, and this call has not waited for it.
        """
        while True:
            with self._lock:
                now = time.monotonic()
                silence = self._blocked.get(host, 0.0) - now
                if silence > longest:
                    return silence
                slot = max(now, self._next.get(host, 0.0), self._blocked.get(host, 0.0))
                self._next[host] = slot + delay
            time.sleep(slot - now)
            # While this thread slept, another may have been told to leave the host alone.
            with self._lock:
                if self._blocked.get(host, 0.0) <= time.monotonic():
                    return 0.0

    def block(self, host: str, seconds: float) -> None:
        """Ask the host nothing for so long."""
        with self._lock:
            self._blocked[host] = max(self._blocked.get(host, 0.0), time.monotonic() + seconds)
