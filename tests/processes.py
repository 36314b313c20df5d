"""Processes for tests of what several do together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def run_processes(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Run ``work`` in a process for each tuple of arguments, all at once; returns how they ended.

    They are forked from a process that has imported much and computed nothing: a fork of the test process itself
    cannot run a backward pass where an earlier test has started autograd's threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "transformers.models.llama.modeling_llama", "kore.adapter"])
    workers = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        worker.kill()
    return [worker.exitcode for worker in workers]


def torchrun(module: str, *words: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """``torchrun -m module words`` in two processes on the CPU, ended with all its processes where it hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    with subprocess.Popen(
        [*command, *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError("the processes hang") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
