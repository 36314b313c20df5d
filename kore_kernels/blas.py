"""SciPy's BLAS, called on the memory of torch tensors: no copy, no NumPy, and the GIL released during the call.

SciPy publishes the addresses of its BLAS routines (``scipy.linalg.cython_blas``), whatever library it was built with.
Through them a routine takes leading dimensions, so a row stride needs no copy, and writes its result in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_INT_MAX = 2**31 - 1
_REAL = {torch.float32: ("ssyrk", ctypes.c_float), torch.float64: ("dsyrk", ctypes.c_double)}

log = logging.getLogger("kore_kernels")


def can_syrk(C: Tensor, x: Tensor) -> bool:
    """Whether :func:`syrk` can read ``x`` (N, d) as it lies in memory."""
    return x.dtype == C.dtype and C.shape[0] <= _INT_MAX and _layout(x) is not None and _routine(C.dtype) is not None


def available() -> bool:
    return _routine(torch.float32) is not None


def describe() -> str:
    if not available():
        return "triangle-blocked torch products (SciPy's BLAS is not available)"
    threads = "" if _openblas() else "; its thread count is its own, not torch's"
    return f"syrk of SciPy's BLAS{threads}"


def syrk(C: Tensor, x: Tensor, alpha: float, triangle: str) -> None:
    """One triangle of ``C += alpha * xᵀ x`` in place; C (d, d) contiguous, x (N, d).

    As many threads as torch uses, where the BLAS lets itself be told.
    """
    routine, layout = _routine(C.dtype), _layout(x)
    assert routine is not None and layout is not None
    trans, ld = layout
    real = _REAL[C.dtype][1]
    d, n = C.shape[0], x.shape[0]
    # BLAS is column-major: it sees Cᵀ, whose upper triangle is the lower one of C.
    uplo = b"U" if triangle == "lower" else b"L"
    with _threads(torch.get_num_threads()):
        routine(
            uplo, trans, _int(d), _int(n), ctypes.byref(real(alpha)), x.data_ptr(), _int(ld),
            ctypes.byref(real(1.0)), C.data_ptr(), _int(d),
        )  # fmt: skip


def _layout(x: Tensor) -> tuple[bytes, int] | None:
    """(trans, leading dimension) under which BLAS can read x (N, d), or None."""
    n, d = x.shape
    rows, columns = (stride if size > 1 else max(n, d) for size, stride in zip(x.shape, x.stride()))
    if d == 1:
        columns = 1
    if columns == 1 and d <= rows <= _INT_MAX and n <= _INT_MAX:
        return b"N", rows
    if (rows == 1 or n == 1) and n <= columns <= _INT_MAX:
        return b"T", columns
    return None


def _int(value: int) -> Any:
    # 64 bits, so that a BLAS with 32-bit integers reads the low half and one with 64-bit integers the whole.
    return ctypes.byref(ctypes.c_int64(value))


@cache
def _routine(dtype: torch.dtype) -> Any:
    try:
        from scipy.linalg import cython_blas

        capsule = cython_blas.__pyx_capi__[_REAL[dtype][0]]
    except (ImportError, AttributeError, KeyError) as error:
        log.info("SciPy's BLAS is not available (%s): torch products are used", error)
        return None
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    pointer = ctypes.c_void_p
    arguments = [ctypes.c_char_p, ctypes.c_char_p, *[pointer] * 8]
    return ctypes.CFUNCTYPE(None, *arguments)(address)


@cache
def _openblas() -> tuple[Any, Any] | None:
    """(get, set) of the thread count of the OpenBLAS that a SciPy wheel carries, or None."""
    import scipy

    package = Path(scipy.__file__).parent
    for folder in (package.parent / "scipy.libs", package / ".dylibs"):
        for library in sorted(folder.glob("*openblas*")):
            with contextlib.suppress(OSError):
                loaded = ctypes.CDLL(str(library))
                for prefix in ("scipy_openblas", "openblas"):
                    for suffix in ("", "64_"):
                        get = getattr(loaded, f"{prefix}_get_num_threads{suffix}", None)
                        put = getattr(loaded, f"{prefix}_set_num_threads{suffix}", None)
                        if get and put:
                            return get, put
    return None


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    functions = _openblas()
    if functions is None or functions[0]() == count:
        yield
        return
    get, put = functions
    before = get()
    put(count)
    try:
        yield
    finally:
        put(before)
