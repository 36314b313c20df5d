"""Times several ways to do the same thing, in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], Any]

_CPU_CACHE = 64 * 2**20
_GPU_FILL = 2**30


class Clock:
    """Times one call at a time, with cold caches.

    On a GPU the time is that between two events on the stream. Before the first event a buffer much larger than the
    L2 cache is filled, which also gives the host time to enqueue the call: without that a short kernel would be timed
    as its launch. :attr:`launch_bound` says whether the host was too slow for that in the last call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launch_bound = False
        size = _GPU_FILL if device.type == "cuda" else _CPU_CACHE
        self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._fill_seconds = 0.0
        if device.type == "cuda":
            self._buffer.fill_(1.0)
            self._fill_seconds = 1e-3 * self._events(lambda: self._buffer.fill_(0.0))

    def milliseconds(self, step: Step) -> float:
        """The time of one call."""
        self._buffer.add_(1.0) if self.device.type == "cpu" else self._buffer.fill_(0.0)
        if self.device.type == "cuda":
            return self._events(step)
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    def _events(self, step: Step) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started = time.perf_counter()
        begin.record()
        step()
        end.record()
        self.launch_bound = time.perf_counter() - started > self._fill_seconds
        end.synchronize()
        return float(begin.elapsed_time(end))

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
    steps: Mapping[str, Step],
    measure: Callable[[Step], float],
    rounds: int,
    warm_up: int = 1,
    seconds: float = float("inf"),
    least_rounds: int = 3,
) -> dict[str, list[float]]:
    """The times of ``rounds`` rounds in which every step runs once; each round starts with another step.

    After ``least_rounds`` no round is begun that would end later than ``seconds`` after the start.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
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
