"""Which failures end a whole run: a key that is refused, a server that is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from kore.augmentation.ask import Asker, NotGenerated
from kore.errors import ConfigError, KoreError, Unavailable

R = TypeVar("R")
_BEFORE_THE_FIRST = 3


class Stop(Exception):
    """Nothing more is to be tried; ``reason`` is what the user is told."""

    def __init__(self, reason: KoreError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Guard:
    """Counts the failures of one service. Several threads use one.

    A request that was answered, even with nothing usable, clears the count. ``stop_after`` failures in a row that may
    pass, or three where none ever succeeded, raise :class:`Stop`, which no item's own error handling catches. From then
    on every call raises it, and nothing is asked.
    """

    def __init__(self, stop_after: int | None) -> None:
        self._limit = stop_after
        self._lock = threading.Lock()
        self._row, self._answered = 0, False
        self._stop: Stop | None = None

    def call(self, function: Callable[[], R], lasting: bool) -> R:
        """Call it. Raises what it raises, or Stop.

        Args:
            function: What to call.
            lasting: Whether an error other than Unavailable stops at once; a ConfigError always does.
        """
        if self._stop is not None:
            raise self._stop
        try:
            result = function()
        except NotGenerated:
            self._good()
            raise
        except Unavailable as error:
            self._bad(error)
            raise
        except KoreError as error:
            if lasting or isinstance(error, ConfigError):
                self._stop = Stop(error)
                raise self._stop from error
            self._bad(error)
            raise
        self._good()
        return result

    def _good(self) -> None:
        with self._lock:
            self._row, self._answered = 0, True

    def _bad(self, error: KoreError) -> None:
        if self._limit is None:
            return
        with self._lock:
            self._row += 1
            row, limit = self._row, self._limit if self._answered else min(self._limit, _BEFORE_THE_FIRST)
        if row >= limit:
            tries = f"{row} requests in a row failed" if row > 1 else "the request failed"
            told = f"{tries}, at last: {error}; what is done is kept (limits.stop_after sets when to stop)"
            self._stop = Stop(KoreError(told))
            raise self._stop from error


class GuardedAsker:
    """An asker whose lasting failures stop the run."""

    def __init__(self, asker: Asker, guard: Guard) -> None:
        self._asker, self._guard = asker, guard

    def ask(self, *arguments: Any, **options: Any) -> Any:
        """As :meth:`Asker.ask`. Raises Stop where nothing more is to be tried."""
        return self._guard.call(lambda: self._asker.ask(*arguments, **options), lasting=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asker, name)


class GuardedImages:
    """Images whose failing searches stop the run."""

    def __init__(self, images: Any, guard: Guard) -> None:
        self._images, self._guard = images, guard

    def find(self, *arguments: Any, **options: Any) -> Any:
        """As ``Images.find``. Raises Stop where nothing more is to be tried."""
        return self._guard.call(lambda: self._images.find(*arguments, **options), lasting=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)
