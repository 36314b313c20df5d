"""What of the kernels runs on this machine, why the rest does not, and whether what runs is right."""

from __future__ import annotations

import importlib
import platform
import time
from dataclasses import dataclass
from typing import Literal

import torch

from kore_kernels import dispatch, extension, selftest


@dataclass(frozen=True)
class Finding:
    """``wrong``: it can be used here and should not be. ``note``: it cannot be used here."""

    name: str
    state: Literal["ok", "note", "wrong"]
    detail: str


def examine(verify: bool = True) -> list[Finding]:
    """Every finding, in the order shown; ``verify`` compares each backend that runs here with float64."""
    rows = [Finding(name, _state(info.available), _describe(info)) for name, info in dispatch.backends().items()]
    return [_versions(), _gpu(), *rows, _cuda(), *(_verified() if verify else [])]


def _state(available: bool) -> Literal["ok", "note"]:
    return "ok" if available else "note"


def _describe(info: dispatch.BackendInfo) -> str:
    return f"{info.detail}; default for {', '.join(info.default_for)}" if info.default_for else info.detail


def _versions() -> Finding:
    libc = " ".join(platform.libc_ver()).strip()
    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"triton {_triton()}"]
    return Finding("versions", "ok", ", ".join([*parts, platform.machine(), *([libc] if libc else [])]))


def _triton() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:  # it loads compiled code, and that may fail in any way
        return f"does not load ({type(error).__name__}: {error})"


def _gpu() -> Finding:
    if torch.version.cuda is None:
        return Finding("GPU", "note", f"torch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:
            return Finding("GPU", "note", f"torch has CUDA {torch.version.cuda}, but: {error}")
        return Finding("GPU", "note", f"torch has CUDA {torch.version.cuda}, but finds no GPU")
    names = [
        "{} (compute capability {}.{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    return Finding("GPU", "ok", f"{', '.join(names)}; torch has CUDA {torch.version.cuda}")


def _cuda() -> Finding:
    """The CUDA kernels of the compiled module."""
    name = "native CUDA"
    if extension.refusal():
        return Finding(name, "note", f"no compiled kernels ({extension.refusal()})")
    module = importlib.import_module(f"{__package__}._native")
    if not hasattr(module, "CUDA_VERSION"):
        return Finding(name, "note", "not compiled in this installation; KORE_BUILD=cuda compiles them")
    architectures = ", ".join(f"sm_{arch}" for arch in module.CUDA_ARCHS.split())
    built = f"compiled for {architectures} with CUDA {_cuda_version(module.CUDA_VERSION)}"
    missing = module.cuda_missing()
    if missing:
        driver = module.cuda_driver()
        knows = f"the driver has CUDA {_cuda_version(driver)}" if driver else "no NVIDIA driver is installed"
        return Finding(name, "note", f"{built}; no GPU can be used: {missing} ({knows})")
    return Finding(name, "ok", built)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _verified() -> list[Finding]:
    start = time.perf_counter()
    rows = []
    for backend, results in selftest.summary(selftest.run()).items():
        failed = [str(result) for result in results if not result.passed]
        worst = max(results, key=lambda result: result.error / selftest.ALLOWED[result.dtype])
        detail = "; ".join(failed) if failed else f"{len(results)} of {len(results)} right beside float64; {worst}"
        rows.append(Finding(f"test of {backend}", "wrong" if failed else "ok", detail))
    seconds = time.perf_counter() - start
    return [*rows, Finding("tested in", "ok", f"{seconds:.1f} s")]
