"""The sanitizers section of the GPU suite: small checks of every kernel under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.native.build import ROOT, build
from benchmarks.native.subjects import FAMILIES, SUBJECTS

if TYPE_CHECKING:
    from benchmarks.gpu_suite import Suite

TOOLS = ("memcheck", "racecheck", "synccheck")
AT_ONCE = 4
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def section(suite: Suite) -> dict[str, Any]:
    """Accesses out of bounds, races in shared memory and wrong barriers, in Triton's kernels and those of csrc/cuda."""
    if suite.device.type == "cpu":
        return {"skipped": "compute-sanitizer checks what runs on a GPU"}
    program = sanitizer()
    if program is None:
        suite.miss("sanitizers: compute-sanitizer is neither in PATH nor beside nvcc; it comes with the CUDA toolkit")
        return {}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(AT_ONCE) as pool:
        runs = [(tool, name, *subject) for name, subject in subjects(suite, scratch).items() for tool in TOOLS]
        found = list(pool.map(lambda run: checked(suite, program, *run), runs))
    return {f"{tool}, {name}": result for (tool, name, *_), result in zip(runs, found)}


def sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    beside = Path(shutil.which("nvcc") or "nvcc").resolve().with_name("compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def subjects(suite: Suite, scratch: str) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Of every kind of kernel that this GPU runs: arguments of Python, and environment."""
    own = ["-m", "benchmarks.gpu_suite", "--quick", "--device", str(suite.device), "--output", f"{scratch}/gpu.json"]
    chosen = {"triton": ([*own, "--only", "correctness", "lora correctness"], {})}
    try:
        build()
    except RuntimeError as error:
        suite.miss(f"sanitizers, CUDA kernels: {error}")
        return chosen
    hopper = torch.cuda.get_device_capability(suite.device) == (9, 0)
    for name in ("hopper", "ampere") if hopper else ("ampere",):
        library, environment = SUBJECTS[name]
        chosen[name] = (["-m", "benchmarks.native.checks", *FAMILIES, "--library", library, "--small"], environment)
    return chosen


def checked(
    suite: Suite, program: str, tool: str, name: str, arguments: list[str], environment: dict[str, str]
) -> dict[str, Any]:
    """One run of one tool: what it counted, and seconds. ``{}`` where it did not come to count."""
    limits = ["--error-exitcode", "9", "--print-limit", "5", "--target-processes", "application-only"]
    command = [program, "--tool", tool, *limits, sys.executable, *arguments]
    started = time.monotonic()
    try:
        ended = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(0.0, suite.left()),
            cwd=ROOT,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        suite.miss(f"{tool}, {name}: no end in time")
        return {}
    counts = [int(count) for count in SUMMARY.findall(ended.stdout)]
    tail = " / ".join(ended.stdout.strip().splitlines()[-8:])
    if not counts:
        suite.miss(f"{tool}, {name}: exit status {ended.returncode} and no summary: {tail}")
        return {}
    if ended.returncode or sum(counts):
        suite.fail(f"{tool}, {name}: exit status {ended.returncode}, {sum(counts)} errors: {tail}")
    return {"errors": sum(counts), "seconds": round(time.monotonic() - started, 1)}
