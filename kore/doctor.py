"""Examine the machine: what is installed, what can run, and whether the main job can."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kore.environment import describe_cpu, describe_gpus, version_of

# Minimal versions; the same as the distribution's own requirements.
REQUIRED = {
    "torch": "2.6",
    "transformers": "4.50",
    "peft": "0.15",
    "accelerate": "1.0",
    "datasets": "3.0",
    "safetensors": "0.4.3",
    "pydantic": "2.6",
    "typer": "0.12",
    "matplotlib": "3.8",
    "jinja2": "3.1",
    "pillow": "10",
}
OPTIONAL = {
    "triton": "GPU kernels",
    "scipy": "fast CPU covariance and eigenvectors",
    "torchvision": "Qwen2.5-VL's own image processor",
    "deepspeed": "train.deepspeed",
    "bitsandbytes": "quantised base models",
    "tensorboard": "training logs",
    "wandb": "train.report_to=wandb",
}
_LOW_DISK = 5 * 2**30


@dataclass(frozen=True)
class Check:
    """One finding: ``missing`` keeps the main job from running, ``note`` does not."""

    name: str
    state: Literal["ok", "note", "missing"]
    detail: str


def examine() -> list[Check]:
    """Every check, in the order shown."""
    return [_python(), *_packages(), *_hardware(), *_kernels(), _disk(), _hub_cache(), *_optional()]


def _python() -> Check:
    fine = sys.version_info >= (3, 10)
    detail = platform.python_version() if fine else f"{platform.python_version()}, expected 3.10 or newer"
    return Check("python", "ok" if fine else "missing", detail)


def _packages() -> list[Check]:
    from packaging.version import Version

    checks = []
    for package, least in REQUIRED.items():
        found = version_of(package)
        if found is None:
            checks.append(Check(package, "missing", f"not installed; pip install '{package}>={least}'"))
        elif Version(found) < Version(least):
            checks.append(Check(package, "missing", f"{found} is too old; pip install '{package}>={least}'"))
        else:
            checks.append(Check(package, "ok", found))
    return checks


def _hardware() -> list[Check]:
    checks = [Check("processor", "ok", describe_cpu())]
    memory = _memory()
    if memory:
        checks.append(Check("memory", "ok", f"{memory / 2**30:.0f} GiB"))
    try:
        gpus = describe_gpus()
    except (ImportError, RuntimeError) as error:
        return [*checks, Check("GPU", "note", f"cannot be examined ({error})")]
    if not gpus:
        return [*checks, Check("GPU", "note", "none; everything runs on the processor")]
    return [*checks, *(Check(f"GPU {index}", "ok", gpu) for index, gpu in enumerate(gpus))]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _kernels() -> list[Check]:
    """Those of ``python -m kore_kernels``: what runs here, why the rest does not, and each backend beside float64."""
    states: dict[str, Literal["ok", "note", "missing"]] = {"ok": "ok", "note": "note", "wrong": "missing"}
    try:
        from kore_kernels import doctor

        findings = doctor.examine()
    except Exception as error:
        return [Check("kernels", "missing", f"kore_kernels cannot be used ({type(error).__name__}: {error})")]
    return [Check(f"kernels {one.name}", states[one.state], one.detail) for one in findings]


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 2**30:.0f} GiB free in {Path.cwd()}"
    return Check("disk", "ok" if free > _LOW_DISK else "note", detail)


def _hub_cache() -> Check:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    models = sorted(cache.glob("models--*")) if cache.is_dir() else []
    offline = "; offline" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
    return Check("hub cache", "ok", f"{cache}: {len(models)} models{offline}")


def _optional() -> list[Check]:
    checks = []
    for package, use in OPTIONAL.items():
        found = version_of(package)
        checks.append(
            Check(package, "ok", f"{found} ({use})") if found else Check(package, "note", f"not installed ({use})")
        )
    return checks
