"""Times several ways to do the same thing, in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Step = Callable[[], Any]
Timed = TypeVar("Timed")
Found = TypeVar("Found")

_CPU_CACHE = 64 * 2**20
_GPU_FILL = 2**30
_MOST_FILLS = 16


class Clock:
    """Times one call at a time, with cold caches.

    On a GPU the time is that between two events on the stream. Before the first event a buffer much larger than the
    L2 cache is filled, which also gives the host time to enqueue the call: without that a short kernel would be timed
    as its launch. :attr:`launch_bound` says whether the host was too slow for that in the last call; the next one then
    gets twice the time, up to 16 fills.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launch_bound = False
        size = _GPU_FILL if device.type == "cuda" else _CPU_CACHE
        self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._fills, self._fill_seconds = 1, 0.0
        if device.type == "cuda":
            self._buffer.fill_(1.0)
            self._fill_seconds = 1e-3 * self._events([lambda: self._buffer.fill_(0.0)])[0][0]

    def milliseconds(self, step: Step) -> float:
        """The time of one call."""
        return self.laps(step)[0]

    def laps(self, *steps: Step) -> list[float]:
        """The milliseconds of calls that follow one another; caches are cold when the first begins."""
        if self.device.type == "cuda":
            for _ in range(self._fills):
                self._buffer.fill_(0.0)
            times, enqueueing = self._events(steps)
            self.launch_bound = enqueueing > self._fills * self._fill_seconds
            if self.launch_bound:
                self._fills = min(2 * self._fills, _MOST_FILLS)
            return times
        self._buffer.add_(1.0)
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [1e3 * (end - begin) for begin, end in itertools.pairwise(marks)]

    def _events(self, steps: Sequence[Step]) -> tuple[list[float], float]:
        """The milliseconds of every step on the device, and the seconds that the host took to enqueue them all."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        started = time.perf_counter()
        marks[0].record()
        for step, mark in zip(steps, marks[1:]):
            step()
            mark.record()
        enqueueing = time.perf_counter() - started
        marks[-1].synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in itertools.pairwise(marks)], enqueueing

    def wall_seconds(self, step: Step) -> float:
        """The time of one long call by the host's clock, from an idle device to an idle device."""
        synchronize(self.device)
        start = time.perf_counter()
        step()
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    steps: Mapping[str, Timed],
    measure: Callable[[Timed], Found],
    rounds: int,
    warm_up: int = 1,
    seconds: float = float("inf"),
    least_rounds: int = 3,
) -> dict[str, list[Found]]:
    """What ``measure`` says in ``rounds`` rounds in which every step runs once; each round starts with another step.

    After ``least_rounds`` no round is begun that would end later than ``seconds`` after the start.
    """
    times: dict[str, list[Found]] = {name: [] for name in steps}
    names, start = list(steps), time.perf_counter()
    for _ in range(warm_up):
        for name in names:
            measure(steps[name])
    for done in range(rounds):
        spent = time.perf_counter() - start
        if done >= least_rounds and spent * (done + warm_up + 1) / (done + warm_up) > seconds:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            times[name].append(measure(steps[name]))
    return times


def ratio(peer: list[float], ours: list[float]) -> dict[str, float]:
    """peer / ours, round by round: the median, the smallest and the largest."""
    ratios = [theirs / mine for theirs, mine in zip(peer, ours)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def summary(values: list[float]) -> dict[str, Any]:
    """The median and the range of times in milliseconds."""
    return {"median_ms": statistics.median(values), "range_ms": [min(values), max(values)]}
