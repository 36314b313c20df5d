"""The CUDA kernels of csrc/cuda on an Ampere or newer GPU, straight through the C ABI: correctness, then times.

    python -m benchmarks.native [--build-only] [--skip-debug]

Builds build/native/*.so with nvcc unless they are of the same sources. Every family of calls is checked against float64
in a process of its own: Hopper's kernels with a build in which a barrier that waits for five seconds is an error, then
as they are shipped, then those of Ampere, which a Hopper GPU runs too. Then they are timed beside cuBLAS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from benchmarks.native.build import ROOT, build
from benchmarks.native.subjects import FAMILIES, SUBJECTS

SECONDS = 60  # for one family


def in_process(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )


def show(name: str, process: subprocess.Popen, seconds: float) -> bool:
    """Print what the process said when it has ended, at the latest after ``seconds``. Whether it ended well."""
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + f"FAIL {name}: no end after {seconds:.0f} s"
    ending = f" (exit status {process.returncode})" if process.returncode else ""
    print(f"[{name}] {output.strip()[-6000:]}{ending}", flush=True)
    return process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--skip-debug", action="store_true")
    options = parser.parse_args()
    start, right = time.perf_counter(), True
    build()
    if options.build_only:
        return 0
    for name, (library, environment) in list(SUBJECTS.items())[options.skip_debug :]:
        families = {
            family: in_process("benchmarks.native.checks", family, "--library", library, environment=environment)
            for family in FAMILIES
        }
        for family, process in families.items():
            right &= show(f"{name}, {family}", process, SECONDS)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    right &= show("times", in_process("benchmarks.native.times"), 120)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
