"""Work in processes of its own, each task after those it needs, with a line for each and the time that is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from kore.errors import KoreError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Attributes:
        name: Unique.
        function: Is called with ``arguments``, and with the results of ``takes`` after them.
        arguments: Of the function; both must travel to a process.
        needs: Names of tasks that come before.
        takes: Names of tasks before it whose results it is given.
        cost: Core-seconds, as expected; for the time left.
        done: Whether its result is known to be on disk, so that it costs nothing.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    cost: float = 1.0
    done: bool = False


@dataclass
class Outcome:
    """Results and failures by task; what needs a task that failed is not run and not named."""

    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def workers(processes: int) -> Executor:
    """Processes for tasks, each on one thread."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_alone)


def _alone() -> None:
    """One thread, and an end at once on Ctrl-C: what is half done is begun anew by the next call."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def run_tasks(
    tasks: Sequence[Task],
    pool: Executor,
    processes: int,
    say: Say,
    describe: Callable[[Task, Any], str] | None = None,
) -> Outcome:
    """Run all tasks, in the order given as far as their needs allow.

    A task that fails stops those that need it and no other.

    Args:
        tasks: Each after those it needs.
        pool: Where they run.
        processes: Of the pool.
        say: Is told a line at the start and after each.
        describe: What is said of a result.

    Raises:
        KoreError: A process was killed; what is finished stays, and the same call goes on from there.
    """
    outcome, waiting, clock = Outcome(), list(tasks), Left(tasks, processes)
    say(f"{len(tasks)} pieces of work, about {minutes(clock.seconds())} with {processes} processes")
    running: dict[Future[Any], Task] = {}
    try:
        while waiting or running:
            _submit(waiting, running, outcome, pool, processes)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    outcome.results[task.name] = future.result()
                    what = describe(task, outcome.results[task.name]) if describe else ""
                except BrokenProcessPool:
                    raise KoreError(
                        f"{task.name}: its process was killed, perhaps for memory; the same command goes on from here"
                    ) from None
                except Exception as error:
                    first = (str(error).strip().splitlines() or [""])[0]
                    outcome.failures[task.name] = f"{type(error).__name__}: {first}"
                    what = f"failed ({outcome.failures[task.name]})"
                clock.finished(task)
                say(f"{clock}  {task.name}{': ' if what else ''}{what}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return outcome


def _submit(waiting: list[Task], running: dict[Future[Any], Task], outcome: Outcome, pool: Executor, most: int) -> None:
    """Start what may start, no more than ``most`` at a time."""
    for task in list(waiting):
        if len(running) >= most:
            return
        if all(need in outcome.results for need in (*task.needs, *task.takes)):
            waiting.remove(task)
            given = (*task.arguments, *(outcome.results[name] for name in task.takes))
            running[pool.submit(task.function, *given)] = task


class Left:
    """How many tasks are done, and about how long the others take."""

    def __init__(self, tasks: Sequence[Task], processes: int) -> None:
        self._total, self._count = len(tasks), 0
        self._open = sum(task.cost for task in tasks if not task.done)
        self._worked, self._started, self._processes = 0.0, time.perf_counter(), processes

    def finished(self, task: Task) -> None:
        self._count += 1
        if not task.done:
            self._worked += task.cost

    def seconds(self) -> float:
        """At the pace so far; before anything is done, as expected."""
        left = self._open - self._worked
        if self._worked == 0:
            return left / self._processes
        return left * (time.perf_counter() - self._started) / self._worked

    def __str__(self) -> str:
        width = len(str(self._total))
        return f"{self._count:{width}d}/{self._total}  about {minutes(self.seconds())} left"


def minutes(seconds: float) -> str:
    """A duration as people say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
