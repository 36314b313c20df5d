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

BACKENDS = ("native", "triton", "torch", "reference")

# Compute capabilities on which an operation's kernels passed the GPU suite on real hardware. There `auto` uses them,
# those of the first backend that can; anywhere else PyTorch multiplies, and KORE_BACKEND opts in. The Triton kernels of
# the LoRA linears passed on (9, 0) in an earlier form.
PROVEN_ON_GPU: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "native": {
        "covariance_update": (),
        "lora_fa_linear": (),
        "lora_fa_linears": (),
    },
    "triton": {
        "covariance_update": ((9, 0),),
        "symmetrize": ((9, 0),),
        "lora_fa_linear": (),
        "lora_fa_linears": (),
    },
}
OPERATIONS = tuple(PROVEN_ON_GPU["triton"])
COMPILED_FOR_CPUS = ("covariance_update", "symmetrize")

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
    return _module(op, name, device)


def next_to_native(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend of calls on a GPU that the compiled kernels are not for: Triton where it can run, else PyTorch."""
    return _module(op, "torch" if _refusal("triton", device, dtype) else "triton", device)


def _module(op: str, name: str, device: torch.device) -> ModuleType:
    """``products.py`` is the torch backend, and the native one of CPUs where the operation has no compiled kernel."""
    if name == "native":
        file = "cuda" if device.type != "cpu" else "native" if op in COMPILED_FOR_CPUS else "products"
    else:
        file = "products" if name == "torch" else name
    return importlib.import_module(f"{__package__}.{op}.{file}")


def _preference(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if device.type == "cpu":
        return "native", "the CPU path"
    for name, proven in PROVEN_ON_GPU.items():
        if proven.get(op) and not _refusal(name, device, dtype) and _capability(device) in proven[op]:
            return name, "its kernels passed the GPU suite on this architecture"
    refusal = _refusal("triton", device, dtype)
    if refusal:
        return "torch", f"Triton: {refusal}"
    unproven = "the Triton kernels have not passed the GPU suite on sm_{}{}; KORE_BACKEND=triton opts in"
    return "torch", unproven.format(*_capability(device))


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run such a call, or None."""
    if name == "native" and device.type != "cpu":
        from kore_kernels import cuda

        return cuda.refusal(device)
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
    """What can run on this machine, and why not: a row for each of ``BACKENDS``."""
    from kore_kernels import blas, cuda, extension

    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    on_gpu = {op: _preference(op, gpu, torch.float32)[0] for op in OPERATIONS} if gpu else {}
    triton_device = gpu or torch.device("cpu")
    refusal = _refusal("triton", triton_device, torch.float32)
    unproven = [op for op, name in on_gpu.items() if name == "torch"]
    if refusal:
        triton_detail = refusal
    elif unproven:
        triton_detail = f"has not passed the GPU suite here ({', '.join(unproven)}); KORE_BACKEND=triton opts in"
    else:
        triton_detail = "interpreter, for tests" if interpreting() else "passed the GPU suite on this architecture"
    gpu_ops = {name: tuple(f"{op} on cuda" for op, chosen in on_gpu.items() if chosen == name) for name in BACKENDS}
    native_detail = f"{extension.describe()}; {blas.describe()}"
    if extension.refusal() is None:
        native_detail += f"; on GPUs: {(gpu and cuda.refusal(gpu)) or cuda.describe()}"
    rows = [
        BackendInfo("native", True, (*(f"{op} on cpu" for op in OPERATIONS), *gpu_ops["native"]), native_detail),
        BackendInfo("triton", refusal is None, gpu_ops["triton"], triton_detail),
        BackendInfo("torch", True, gpu_ops["torch"], "PyTorch's products, in place; any device and dtype"),
        BackendInfo("reference", True, gpu_ops["reference"], "the definitions in plain PyTorch; any device and dtype"),
    ]
    return {row.name: row for row in rows}
