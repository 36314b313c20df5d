"""What each of the processes that capture together does in ``test_capture_processes``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from kore.capture import capture_covariance
from kore.distributed import Processes
from kore.errors import KoreError
from kore.models import language_model_linears
from kore.triangle import Triangle
from tests.batches import MODELS, make_batch, make_batches


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


def mixed_batches() -> list[dict[str, torch.Tensor]]:
    """The second has no image, so that a process that begins with it does not see the projector run."""
    text = {name: value for name, value in make_batch("llama", 9).items() if name != "labels"}
    first, *others = make_batches("llava", 4)
    return [first, text, *others]


def mixed_targets(model: nn.Module) -> list[str]:
    return ["linear_1", "linear_2", *language_model_linears(model)]


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
        model, options = MODELS["llava"](), {"memory_budget": 100_000, "buffer_rows": 64}
        data, targets, folder = mixed_batches()[rank::2], mixed_targets(model), output / "windows"
        cov = capture_covariance(model, data, targets, progress=False, checkpoint=folder, **options)
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


def add_up_small(rank: int, output: Path) -> None:
    """1 + 2⁻²⁴ + 2⁻²⁴: rounded to float32 after each sum it is 1, rounded once it is more."""
    buffer = torch.full((3, 2), float(rank))
    Triangle(buffer[1:], "lower").assign(torch.full((2, 2), 2.0**-24 if rank else 1.0))
    Processes().add_up(Triangle(buffer[1:], "lower"))
    torch.save(buffer, output / f"small-{rank}")


def work(rank: int, count: int, store: Path, output: Path, cases: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    for case in cases:
        add_up_small(rank, output) if case == "small" else run(case, rank, output)
    dist.destroy_process_group()
