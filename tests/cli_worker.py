"""The command line in one of torchrun's processes, for ``test_cli_processes``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import torch

from kore.adapter import compute
from kore.adapter.parts import Parts
from kore.cli.main import main


def call(words: Sequence[str]) -> int:
    """KORE_TEST_DIES: die after the first part. KORE_TEST_LOG: a file that gets a dot for each null space solved."""
    write, solve = Parts.write, compute.null_space

    def write_and_die(self, *arguments):
        write(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    def count(*arguments, **options):
        with open(f"{os.environ['KORE_TEST_LOG']}-{os.environ['RANK']}", "a") as file:
            file.write(".")
        return solve(*arguments, **options)

    if "KORE_TEST_DIES" in os.environ:
        Parts.write = write_and_die
    if "KORE_TEST_LOG" in os.environ:
        compute.null_space = count
    torch.set_num_threads(1)
    return main(words)


def run(words: Sequence[str], environment: dict[str, str], log: str) -> None:
    """In a process of its own: what it prints goes to ``log``."""
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        status = call(list(words))
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(status)


if __name__ == "__main__":
    sys.exit(call(sys.argv[1:]))
