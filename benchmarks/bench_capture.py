"""A pass over a 4-layer LLaVA (d = 1024): plain, with KORE's capture, and with the official hooks.

pytest benchmarks/bench_capture.py --benchmark-only     # each pass by itself
python -m benchmarks.bench_capture [--rounds 7]         # the passes in turn, and what each adds to the plain one
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from typing import Any

import pytest
import torch

from kore.bench import capture
from kore.bench.llava import SMALL, random_batches, random_llava
from kore.bench.timing import Clock

CPU = torch.device("cpu")


@cache
def workload(count: int = 4) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The model in float32, and samples of 576 image and 64 text tokens, one a batch, as the official code wants."""
    return random_llava(SMALL, CPU, torch.float32), random_batches(SMALL, count, 1, 64, torch.float32)


@pytest.mark.parametrize("name", [capture.PLAIN, capture.CAPTURE, capture.CAPTURE_SCALED, capture.OFFICIAL])
def test_pass(benchmark, name):
    model, batches = workload(2)
    benchmark.group = "pass over a 4-layer LLaVA"
    benchmark.pedantic(capture.passes(model, batches)[name], rounds=2, warmup_rounds=1)


def measure(rounds: int, batches: int = 4) -> dict[str, Any]:
    """The interleaved measurement, after the check of every covariance."""
    return capture.measure(*workload(batches), Clock(CPU), rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(arguments.rounds), indent=1))
