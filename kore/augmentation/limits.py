"""How fast a service is asked, how failures are waited out, and what it all took."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from kore.errors import KoreError, Unavailable

Value = TypeVar("Value")
MINUTE = 60.0


def estimate_tokens(texts: Iterable[str]) -> int:
    """About how many tokens texts have: a fourth of their UTF-8 bytes, which is a little much for English."""
    return sum(len(text.encode("utf-8", "replace")) // 4 + 1 for text in texts)


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in the currency of the user's choice."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Accounting:
    """What was asked, what it took and what it costs. Several threads count at once."""

    def __init__(self, prices: Prices | None = None) -> None:
        self.prices = prices or Prices()
        self._lock = threading.Lock()
        self.requests = 0
        self.cached = 0
        self.failed = 0
        self.rejected = 0
        self.unmetered = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.waited_seconds = 0.0

    def add(self, **counts: float) -> None:
        """Add to the counts named."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    @property
    def cost(self) -> float:
        """In the currency of the prices; 0 where none are given."""
        return self.prices.cost(self.prompt_tokens, self.completion_tokens)

    def summary(self) -> dict[str, Any]:
        """All counts: ``requests`` sent, ``failed`` ones among them, replies ``cached`` and so not asked for,
        replies ``rejected`` by the checks, ``unmetered`` replies whose server counts no tokens."""
        with self._lock:
            return {
                "requests": self.requests,
                "failed": self.failed,
                "cached": self.cached,
                "rejected": self.rejected,
                "unmetered": self.unmetered,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "cost": round(self.cost, 6),
                "waited_seconds": round(self.waited_seconds, 3),
            }


class _Entry:
    """A request in the window: when it may start and how many tokens it takes."""

    __slots__ = ("time", "tokens")

    def __init__(self, time: float, tokens: int) -> None:
        self.time = time
        self.tokens = tokens


class RateLimiter:
    """At most so many requests and tokens in any minute; who asks first starts first.

    Args:
        requests: Per minute, or None for no limit.
        tokens: Per minute, or None. A single request above it waits for an empty minute.
        clock: Seconds that never go back.
    """

    def __init__(
        self, requests: float | None = None, tokens: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        for name, value in (("requests", requests), ("tokens", tokens)):
            if value is not None and value <= 0:
                raise KoreError(f"{name} per minute: expected more than 0, or none for no limit, got {value}")
        # Less than one request a minute is one in a longer time.
        self._window = MINUTE / requests if requests is not None and requests < 1 else MINUTE
        self._requests = None if requests is None else max(1, int(requests))
        self._tokens, self._clock = tokens, clock
        self._lock = threading.Lock()
        self._entries: deque[_Entry] = deque()
        self._not_before = float("-inf")

    def reserve(self, tokens: int = 0) -> tuple[float, _Entry]:
        """Take the next free place. Returns the seconds to wait for it, and the place for ``correct``."""
        with self._lock:
            now = self._clock()
            while self._entries and self._entries[0].time <= now - self._window:
                self._entries.popleft()
            start = max(now, self._not_before, self._entries[-1].time if self._entries else now)
            if self._requests is not None and len(self._entries) >= self._requests:
                start = max(start, self._entries[-self._requests].time + self._window)
            if self._tokens is not None:
                room = self._tokens - min(tokens, self._tokens)
                for entry in reversed(self._entries):
                    if entry.time + MINUTE <= start:
                        break
                    room -= entry.tokens
                    if room < 0:
                        start = max(start, entry.time + MINUTE)
                        break
            place = _Entry(start, tokens)
            self._entries.append(place)
            return start - now, place

    def correct(self, place: _Entry, tokens: int) -> None:
        """Replace the estimate of a place by what it really took."""
        with self._lock:
            place.tokens = tokens

    def pause(self, seconds: float) -> None:
        """Let no request start for some seconds: the server said so."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + seconds)

    def remaining_pause(self) -> float:
        """Seconds until requests may start again."""
        with self._lock:
            return max(0.0, self._not_before - self._clock())


class Limits:
    """Rate limits, repetition after passing failures, and the accounting of one service.

    Args:
        requests_per_minute: At most, or None.
        tokens_per_minute: At most, or None.
        retries: Repetitions after a passing failure, before it is given up.
        backoff: Seconds before the first repetition; doubled for each further one, with jitter.
        longest_wait: Seconds that one wait may last. A server that asks for a longer one is given up.
        prices: Of the tokens.
        clock: Seconds that never go back.
        sleep: How to wait; by default in a way that ``stop`` ends.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        retries: int = 5,
        backoff: float = 1.0,
        longest_wait: float = 120.0,
        prices: Prices | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        self.accounting = Accounting(prices)
        self.retries, self.backoff, self.longest_wait = retries, backoff, longest_wait
        self._limiter = RateLimiter(requests_per_minute, tokens_per_minute, clock)
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

    def stop(self) -> None:
        """End all waits: what waits or asks from now on raises Unavailable."""
        self._stopped.set()

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self.accounting.add(waited_seconds=seconds)
            self._sleep(seconds)
        if self._stopped.is_set():
            raise Unavailable("stopped before the answer came; run it again to go on")

    def _start(self, tokens: int) -> _Entry:
        seconds, place = self._limiter.reserve(tokens)
        self._wait(seconds)
        while (pause := self._limiter.remaining_pause()) > 0:
            self._wait(pause)
        return place

    def delay(self, retry: int, name: str) -> float:
        """Seconds before a repetition: between half of ``backoff * 2**retry`` and all of it, the same for a name."""
        jitter = random.Random(hashlib.sha256(f"{name}/{retry}".encode()).digest()).random()
        return min(self.longest_wait, self.backoff * 2.0**retry) * (0.5 + 0.5 * jitter)

    def call(
        self,
        function: Callable[[], Value],
        *,
        name: str,
        tokens: int = 0,
        used: Callable[[Value], int] | None = None,
    ) -> Value:
        """Call the service within the limits, again after each passing failure.

        Args:
            function: Asks once.
            name: Of the request; the jitter follows from it.
            tokens: About how many it takes.
            used: How many its result says that it took, 0 for unknown.

        Raises:
            Unavailable: It failed ``retries`` + 1 times, or asked for too long a wait, or ``stop`` was called.
        """
        for retry in range(self.retries + 1):
            place = self._start(tokens)
            self.accounting.add(requests=1)
            try:
                result = function()
            except Unavailable as error:
                self.accounting.add(failed=1)
                asked = error.retry_after
                if asked is not None and asked > self.longest_wait:
                    raise Unavailable(
                        f"{error}; it asks to wait {asked:.0f} s, longer than the {self.longest_wait:.0f} s allowed: "
                        "run it again later, what is done is kept"
                    ) from None
                if asked:
                    self._limiter.pause(asked)
                if retry == self.retries:
                    tries = f"{retry + 1} times" if retry else "once"
                    raise Unavailable(f"{error} (tried {tries}); run it again later, what is done is kept") from None
                self._wait(max(self.delay(retry, name), asked or 0.0))
            except BaseException:
                self.accounting.add(failed=1)
                raise
            else:
                if used is not None and (count := used(result)):
                    self._limiter.correct(place, count)
                return result
        raise AssertionError("unreachable")
