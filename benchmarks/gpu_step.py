"""The training-step section of the GPU suite: whole optimizer steps of a random model of LLaVA-1.5-7B's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kore.bench import step, step_peers
from kore.bench.llava import LLAVA_7B, TINY, random_batches, random_llava
from kore.bench.machine import settings

if TYPE_CHECKING:
    from benchmarks.gpu_suite import Suite


def section(suite: Suite) -> dict[str, Any]:
    """AdamW steps of a random LLaVA in every form, with gradient checkpointing: time, tokens/s and peak memory."""
    if suite.left() < (0 if suite.quick else 40):
        suite.miss("training step")
        return {}
    shape, dtype = (TINY, torch.float32) if suite.quick else (LLAVA_7B, torch.bfloat16)
    count, rank, lora_rank = (2, 12, 8) if suite.quick else (16, 235, 128)
    model = random_llava(shape, suite.device, dtype)
    batch = {key: value.to(suite.device) for key, value in random_batches(shape, 1, count, 64, dtype)[0].items()}
    ids = batch["input_ids"]
    batch["labels"] = torch.where(ids == shape.vocabulary - 1, -100, ids)
    with settings(suite.device, suite.backend):
        found = step.measure(
            model,
            batch,
            suite.clock,
            rank,
            lora_rank,
            rounds=5,
            seconds=0.5 * suite.left(),
            wide=torch.float64 if suite.quick else torch.float32,
            texts=2,
            checkpointing=True,
            say=_say,
        )
    for name, row in found["contenders"].items():
        peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**30:.1f} GiB"
        _say(f"{name}: {row['step']['median_ms']:.0f} ms, {row['tokens_per_second']:.0f} tokens/s{peak}")
    lora = step_peers.peft_name(lora_rank, trained=True)
    ours, theirs = (found["contenders"][name]["peak_bytes"] for name in (step_peers.OURS, lora))
    return {**found, "batch": count, "peak below PEFT's LoRA": None if ours is None else ours < theirs}


def _say(line: str) -> None:
    print(line, flush=True)
