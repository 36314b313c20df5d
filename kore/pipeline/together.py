"""A stage in all of torchrun's processes, as ``torchrun -m kore init`` starts it, and how its work is shared out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kore.pipeline.stage import Say, Stage, begin, finish, is_done, only_one

if TYPE_CHECKING:
    from kore.covariance import CovarianceSet
    from kore.distributed import Processes

_LONGEST_WAIT = timedelta(days=2)
C = TypeVar("C")
T = TypeVar("T")


def run_together(stage: Stage[C], context: C, say: Say) -> None:
    """Run a stage whose work the processes share; the first decides whether it runs, holds its output and records it.

    The stage itself splits its work over ``torch.distributed``'s processes, and writes its result in the first one.
    All processes must see the same files.

    Raises:
        KoreError: The stage failed, here or in another process.
    """
    with _process_group() as processes, contextlib.ExitStack() as held:
        first = processes.rank == 0
        with processes.fail_together(stage.name):
            if first:
                held.enter_context(only_one(stage.output))
        done = processes.share(is_done(stage) if first else None)[0]
        with processes.fail_together(stage.name):
            if not done:
                stage.check(context)
        about = None
        with processes.fail_together(stage.name):
            if first:
                about = begin(stage, say)
        if not processes.share(about is not None)[0]:
            return
        started = time.perf_counter()
        with processes.fail_together(stage.name):
            result = stage.run(context)
        if about is not None:
            finish(stage, about, result, time.perf_counter() - started, say)


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Of n processes each gets every n-th item, from that of its number on; a process alone gets all."""
    from kore.distributed import Processes

    processes = Processes()
    return items if processes.count == 1 else list(items)[processes.rank :: processes.count]


def save_once(covariance: CovarianceSet, path: Path, *, keep_groups: bool = False) -> None:
    """Save what all processes have alike, in the first one, in place of what they keep there while they work.

    It waits until all are done with that, and they until it is saved.
    """
    from kore.distributed import Processes

    processes = Processes()
    processes.share(None)
    with processes.fail_together():
        if processes.rank == 0:
            covariance.save(path, keep_groups=keep_groups)


@contextlib.contextmanager
def _process_group() -> Iterator[Processes]:
    """torch.distributed for the length of a block, over NCCL for tensors on GPUs and over gloo for others."""
    import torch
    import torch.distributed as dist

    from kore.distributed import Processes

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # A process that has answered or captured its share waits for slower ones; torchrun ends all when one dies.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()
