"""The compiled CPU kernels (``csrc/``): whether they are there, and the instruction set they use.

An installation without them works: the operations then use BLAS and torch. ``KORE_CPU_ISA``, read at each call, asks
for an instruction set below the machine's best: portable, avx2, avx512, avx512_bf16 or amx_bf16.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

ABI_VERSION = 3
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

log = logging.getLogger("kore_kernels")


def refusal() -> str | None:
    """Why the compiled kernels cannot be used, or None."""
    return _load()[1]


def describe() -> str:
    """What the compiled kernels are made of, or why they are not used."""
    missing = refusal()
    if missing:
        return f"no compiled kernels ({missing})"
    try:
        level = ISAS[isa()]
    except (ValueError, RuntimeError) as error:
        level = str(error)
    threads = torch.get_num_threads()
    return f"compiled kernels ({level}; {threads} thread{'s' if threads > 1 else ''})"


def isa() -> int:
    """The level of the instruction set to use, an index into ``ISAS``.

    Raises ValueError when ``KORE_CPU_ISA`` names none, RuntimeError when it names one that cannot run here.
    """
    best, setting = _best(), os.environ.get("KORE_CPU_ISA")
    if not setting:
        return best
    if setting not in ISAS:
        raise ValueError(f"KORE_CPU_ISA must be {', '.join(ISAS)}, got {setting!r}")
    if ISAS.index(setting) > best:
        raise RuntimeError(f"KORE_CPU_ISA={setting} cannot run here: the best for this machine is {ISAS[best]}")
    return ISAS.index(setting)


def covariance_update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float, triangle: str, level: int
) -> None:
    """C (d, d) float32 contiguous, x (N, d), mask and weight (N,); ``level`` is an index into ``ISAS``."""
    mask = None if mask is None else mask.contiguous()
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    _module().covariance_update(
        C.data_ptr(),
        C.shape[0],
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        x.stride(1),
        _DTYPES[x.dtype],
        0 if mask is None else mask.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        alpha,
        triangle == "upper",
        level,
        torch.get_num_threads(),
    )


def symmetrize(C: Tensor, triangle: str) -> None:
    """C (d, d) contiguous."""
    upper = triangle == "upper"
    _module().symmetrize(C.data_ptr(), C.shape[0], C.element_size(), upper, torch.get_num_threads())


def dropout(x: Tensor, seed: int, threshold: int, first: int, out: Tensor, level: int) -> None:
    """out (n, d) contiguous = x (n, d), the rows from ``first`` on, with zeros where elements are dropped."""
    _module().dropout(
        x.data_ptr(), *x.shape, *x.stride(), x.element_size(), first, seed, threshold, out.data_ptr(), level,
        torch.get_num_threads(),
    )  # fmt: skip


def _module() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the compiled CPU kernels are not there: {reason}")
    return module


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why not)."""
    try:
        module = importlib.import_module(f"{__package__}._native")
    except ModuleNotFoundError:
        return None, "not compiled in this installation"
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    if module.ABI_VERSION != ABI_VERSION:
        found = f"was compiled for interface {module.ABI_VERSION}, this package has {ABI_VERSION}"
        return None, f"the compiled module {found}; install the package again"
    return module, None


@cache
def _best() -> int:
    """The highest level of this processor whose numbers agree with the portable code's, here and now."""
    level = _module().cpu_isa()
    while level and not _agrees(level):
        log.warning("the CPU kernels for %s give wrong numbers on this machine and are not used", ISAS[level])
        level -= 1
    return level


def _agrees(level: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dtype in _DTYPES:
        x = torch.randn(71, 100, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for triangle in ("lower", "upper"):
            ours, portable = x.new_zeros(2, 100, 100, dtype=torch.float32)
            covariance_update(ours, x, None, None, 1.0, triangle, level)
            covariance_update(portable, x, None, None, 1.0, triangle, 0)
            if not torch.allclose(ours, portable, rtol=1e-5, atol=1e-4):
                return False
        ours, portable = torch.empty_like(x), torch.empty_like(x)
        dropout(x, 1, 2**30, 0, ours, level)
        dropout(x, 1, 2**30, 0, portable, 0)
        if not torch.equal(ours, portable):
            return False
    return True
