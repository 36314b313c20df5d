"""The model section of the GPU suite: capture on a random model of LLaVA-1.5-7B's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kore.bench import capture
from kore.bench.llava import LLAVA_7B, TINY, random_batches, random_llava
from kore.bench.machine import settings

if TYPE_CHECKING:
    from benchmarks.gpu_suite import Suite

GOAL = 1.6


def section(suite: Suite) -> dict[str, Any]:
    """Forward with capture over plain forward, in batches of 4; then in batches of 1, the official hooks beside it."""
    shape, dtype = (TINY, torch.float32) if suite.quick else (LLAVA_7B, torch.bfloat16)
    count = 2 if suite.quick else 16
    stored: dict[str, Any] = {}
    suite.result["model"] = stored
    model = random_llava(shape, suite.device, dtype)
    stored["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {stored['parameters'] / 1e9:.2f} G parameters", flush=True)
    for name, batch_size, official in (("batches of 4", 4, False), ("batches of 1", 1, True)):
        if suite.left() < (0 if suite.quick else 25):
            suite.miss(f"model, {name}")
            break
        batches = random_batches(shape, count, batch_size, 64, dtype)
        if suite.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(suite.device)
        with settings(suite.device, suite.backend):
            measured = capture.measure(
                model, batches, suite.clock, rounds=5, seconds=0.4 * suite.left(), official=official
            )
        if suite.device.type == "cuda":
            measured["peak_bytes"] = torch.cuda.max_memory_allocated(suite.device)
        stored[name] = measured
        shares = {key: f"{ratio['median']:.2f}×" for key, ratio in measured["over_plain"].items()}
        print(f"{name}, over plain forward ({measured['median_s'][capture.PLAIN]:.3f} s): {shares}", flush=True)
        suite.save()
    if "batches of 4" in stored:
        found = stored["batches of 4"]["over_plain"][capture.CAPTURE]["median"]
        stored["goals"] = {"capture / plain forward": {"goal": GOAL, "most": found}}
    return stored
