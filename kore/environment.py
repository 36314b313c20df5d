"""What a result was made with: versions, hardware, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "datasets", "safetensors", "scipy", "numpy")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_cpu() -> str:
    """Processor name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def describe_gpus() -> list[str]:
    """Name and memory of every CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in properties]


def commit() -> str | None:
    """The commit of the source tree KORE runs from, with a mark when it has changes; None when installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + (" with changes" if changed.returncode else "")


def environment() -> dict[str, str | None]:
    """Names and values for a report."""
    from kore import __version__

    gpus = describe_gpus()
    return {
        "kore": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.release()}, {sys.platform}",
        "processor": describe_cpu(),
        "GPU": "; ".join(gpus) if gpus else "none",
    }
