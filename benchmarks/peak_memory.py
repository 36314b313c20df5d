"""Peak memory that one covariance update takes on top of C and x, on the CPU.

    python -m benchmarks.peak_memory --way covariance_update_ --dtype bfloat16

A process of its own makes C and x, touches every page, does one tiny update so that libraries and thread stacks are
there, resets the kernel's high-water mark of its resident memory (/proc/self/clear_refs), does one update and reads
the mark (VmHWM). It prints the difference to the resident memory before, in bytes. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kore.bench.machine import DTYPES
from kore.bench.peers import PEERS

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured(way: str, dtype: str, d: int = 4096, n: int = 2048, threads: int = 2) -> int:
    """The peak of one update in a fresh process, in bytes."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--way", way, "--dtype", dtype]
    command += ["--d", str(d), "--n", str(n), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout)


def peak_of(step: Callable[[], Any]) -> int:
    """The most that a call holds on top of what the process holds before it, in bytes, by the kernel's count."""
    before = _resident("VmRSS")
    CLEAR.write_text("5")
    step()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    peers = {peer.name: peer for peer in PEERS}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--way", default=PEERS[0].name, choices=list(peers))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    torch.manual_seed(0)
    x, C = torch.randn(arguments.n, arguments.d).to(dtype), torch.ones(arguments.d, arguments.d)
    peers[arguments.way].prepare(torch.ones(64, 64), torch.randn(64, 64).to(dtype))()
    print(peak_of(peers[arguments.way].prepare(C, x)))


if __name__ == "__main__":
    main()
