"""What each of two processes that capture together does in ``test_capture_processes``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from kore.capture import capture_covariance
from kore.errors import KoreError
from tests.batches import MODELS, make_batches


class Whole(nn.Module):
    """Layers whose inputs are small whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(300, 300, bias=False) for _ in range(3))

    def forward(self, input_ids):
        return self.a(input_ids), self.b(input_ids), self.c((input_ids * 3).round())


def whole_batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(-9, 9, (2, 7, 300), generator=generator).float()} for _ in range(count)]


def run(case: str, rank: int, output: Path) -> None:
    if case == "whole":
        torch.manual_seed(0)
        cov = capture_covariance(Whole(), whole_batches(5)[rank::2], progress=False, buffer_rows=16)
    elif case == "llava":
        cov = capture_covariance(MODELS["llava"](), make_batches("llava", 5)[rank::2], progress=False)
    elif case == "idle":  # the second process has no data
        data = make_batches("llava", 3) if rank == 0 else []
        cov = capture_covariance(MODELS["llava"](), data, progress=False)
    elif case == "windows":
        folder = output / "windows"
        data = make_batches("llava", 5)[rank::2]
        cov = capture_covariance(
            MODELS["llava"](), data, progress=False, memory_budget=100_000, buffer_rows=64, checkpoint=folder
        )
    elif case in ("killed", "continued"):
        data = make_batches("llava", 6)[rank::2]

        def batches():
            yield from data[:2]
            if case == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            yield data[2]

        folder = output / "checkpoint"
        cov = capture_covariance(MODELS["llava"](), batches(), progress=False, checkpoint=folder, checkpoint_every=1)
    elif case == "fails":  # in one process only
        data = make_batches("llava", 2) if rank == 0 else ["no dictionary"]
        try:
            capture_covariance(MODELS["llava"](), data, progress=False)
        except KoreError as error:
            (output / f"error-{rank}").write_text(str(error))
        return
    elif case == "alone":
        cov = capture_covariance(MODELS["llava"](), make_batches("llava", 1 + rank), progress=False, distributed=False)
    cov.save(output / f"{case}-{rank}")


def work(rank: int, store: Path, output: Path, cases: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in cases:
        run(case, rank, output)
    dist.destroy_process_group()
