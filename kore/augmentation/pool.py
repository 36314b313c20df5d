"""Work on many things with a few threads, holding few of them at a time."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

J = TypeVar("J")
R = TypeVar("R")

_TURN = 0.25
GRACE = 5.0
"""Seconds that threads get to end their job when the work is broken off."""


def in_threads(
    work: Callable[[J], R], jobs: Iterable[J], workers: int, stop: Callable[[], None] = lambda: None
) -> Generator[tuple[J, R], None, None]:
    """Yield each job with what ``work`` makes of it, in the order in which they end.

    ``jobs`` is asked for one only when there is room: twice as many as workers are held. When the loop over this is
    left early, or a job raises, nothing more is begun and ``stop`` is called, which may end what jobs wait for; those
    under way get :data:`GRACE` seconds, and none of them keeps the program from ending.

    Raises:
        Exception: The first that a job raises.
    """
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end = object()

    def serve() -> None:
        while (job := todo.get()) is not end:
            try:
                done.put((job, work(job), None))
            except BaseException as error:
                done.put((job, None, error))

    def next_done() -> tuple[J, R]:
        while True:
            # A signal that another thread receives does not wake the main thread; it sees it at the next turn.
            with contextlib.suppress(queue.Empty):
                job, result, error = done.get(timeout=_TURN)
                if error is not None:
                    raise error
                return job, result

    threads = [threading.Thread(target=serve, name=f"kore-augment-{number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    held = 0
    try:
        for job in jobs:
            todo.put(job)
            held += 1
            if held == 2 * workers:
                yield next_done()
                held -= 1
        for _ in range(held):
            yield next_done()
    except BaseException:
        stop()
        raise
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                todo.get_nowait()
        for _ in threads:
            todo.put(end)
        until = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
