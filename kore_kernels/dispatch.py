"""Which backend runs a call.

``KORE_BACKEND`` is read at every call. A named backend is used or the call raises; ``auto`` takes the first that can
run in the order of :func:`_preference` and logs the choice, with its reason, once.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("native", "triton", "reference")

# Compute capabilities on which an operation's Triton kernels passed the GPU suite on real hardware. There `auto` uses
# them; anywhere else it stays with plain PyTorch, and KORE_BACKEND=triton opts in.
PROVEN_ON_GPU: dict[str, tuple[tuple[int, int], ...]] = {
    "covariance_update": (),
    "symmetrize": (),
    "lora_fa_linear": (),
    "lora_fa_linears": (),
}

log = logging.getLogger("kore_kernels")


@dataclass(frozen=True)
class BackendInfo:
    """One row of :func:`backends`: can this backend run here, what uses it by default, and why."""

    name: str
    available: bool
    default_for: tuple[str, ...]
    detail: str

    def __str__(self) -> str:
        state = "available" if self.available else "not available"
        return f"{self.name}: {state}; {self.detail}"


def select(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module of operation ``op`` (its folder's name) for tensors on ``device`` that compute in ``dtype``.

    Raises RuntimeError when ``KORE_BACKEND`` names a backend that cannot run this call, ValueError when it names none.
    """
    return _select(os.environ.get("KORE_BACKEND") or "auto", op, device, dtype)


@cache
def _select(setting: str, op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    if setting == "auto":
        name, reason = _preference(op, device, dtype)
        log.info("%s on %s (%s): %s backend, %s", op, device, dtype, name, reason)
    elif setting in BACKENDS:
        name, refusal = setting, _refusal(setting, device, dtype)
        if refusal:
            raise RuntimeError(f"KORE_BACKEND={setting} cannot run {op} on {device} in {dtype}: {refusal}")
    else:
        raise ValueError(f"KORE_BACKEND must be auto, {', '.join(BACKENDS)}, got {setting!r}")
    return importlib.import_module(f"{__package__}.{op}.{name}")


def _preference(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if device.type == "cpu":
        return "native", "the CPU path"
    refusal = _refusal("triton", device, dtype)
    if refusal:
        return "reference", f"Triton: {refusal}"
    capability = torch.cuda.get_device_capability(device)
    if capability in PROVEN_ON_GPU[op]:
        return "triton", "its kernels passed the GPU suite on this architecture"
    return "reference", (
        "its Triton kernels have not passed the GPU suite on sm_{}{}; KORE_BACKEND=triton opts in".format(*capability)
    )


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run such a call, or None."""
    if name == "native" and device.type != "cpu":
        return "the native backend runs on CPU tensors"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if dtype == torch.float64:
            return "float64 has no Triton kernel; use reference or auto"
        if interpreting():
            return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors"
        if device.type != "cuda" or torch.version.cuda is None:
            return "Triton kernels need an NVIDIA GPU (on the CPU they run only under TRITON_INTERPRET=1)"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "Triton kernels need compute capability 8.0 or newer"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (decided when a kernel's module is first imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> dict[str, BackendInfo]:
    """What can run on this machine, and why not: ``{"native": ..., "triton": ..., "reference": ...}``."""
    from kore_kernels import blas, extension

    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    on_gpu = {op: _preference(op, gpu, torch.float32)[0] for op in PROVEN_ON_GPU} if gpu else {}
    triton_device = gpu or torch.device("cpu")
    refusal = _refusal("triton", triton_device, torch.float32)
    unproven = [op for op, name in on_gpu.items() if name != "triton"]
    if refusal:
        triton_detail = refusal
    elif unproven:
        triton_detail = f"has not passed the GPU suite here ({', '.join(unproven)}); KORE_BACKEND=triton opts in"
    else:
        triton_detail = "interpreter, for tests" if interpreting() else "passed the GPU suite on this architecture"
    gpu_ops = {name: tuple(f"{op} on cuda" for op, chosen in on_gpu.items() if chosen == name) for name in BACKENDS}
    native_detail = f"{extension.describe()}; {blas.describe()}"
    rows = [
        BackendInfo("native", True, tuple(f"{op} on cpu" for op in PROVEN_ON_GPU), native_detail),
        BackendInfo("triton", refusal is None, gpu_ops["triton"], triton_detail),
        BackendInfo("reference", True, gpu_ops["reference"], "plain PyTorch, any device and dtype"),
    ]
    return {row.name: row for row in rows}
