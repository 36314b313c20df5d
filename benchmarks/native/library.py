"""The C ABI's functions on tensors."""

from __future__ import annotations

import ctypes

import torch

from benchmarks.native.build import BUILD


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("rows", "columns", "stride_row", "stride_column")
    ]


class Native:
    """The library's functions on tensors."""

    def __init__(self, name: str):
        self.library = ctypes.CDLL(str(BUILD / f"{name}.so"))
        self.library.kore_cuda_covariance_workspace.restype = ctypes.c_int64
        self.library.kore_cuda_two_products_workspace.restype = ctypes.c_int64
        self.library.kore_cuda_message.restype = ctypes.c_char_p
        self.workspace = None

    def covariance(self, C, x, alpha=1.0, upper=False, factor=None) -> None:
        n, d = x.shape
        space = self._space(self.library.kore_cuda_covariance_workspace(ctypes.c_int64(n), ctypes.c_int64(d)))
        self._check(
            self.library.kore_cuda_covariance_update(
                _pointer(C), ctypes.c_int64(d), _pointer(x), ctypes.c_int64(n), ctypes.c_int64(x.stride(0)),
                _code(x), ctypes.c_float(alpha), _pointer(factor), int(upper), _pointer(space),
                ctypes.c_int64(space.numel()), _stream(),
            )
        )  # fmt: skip

    def two_products(self, out, L, R, bias=None, P=None, Q=None, scaling=1.0, add=None) -> None:
        matrices = {
            name: _matrix(t) for name, t in (("out", out), ("L", L), ("R", R), ("P", P), ("Q", Q), ("add", add))
        }
        space = self._space(
            self.library.kore_cuda_two_products_workspace(matrices["out"], matrices["L"], matrices["P"])
        )
        self._check(
            self.library.kore_cuda_two_products(
                matrices["out"], matrices["L"], matrices["R"], _pointer(bias), matrices["P"], matrices["Q"],
                ctypes.c_float(scaling), matrices["add"], _code(L), _pointer(space), ctypes.c_int64(space.numel()),
                _stream(),
            )
        )  # fmt: skip

    def _space(self, size: int):
        if self.workspace is None or self.workspace.numel() < size:
            self.workspace = torch.full((max(size, 16),), 255, dtype=torch.uint8, device="cuda")  # float32 NaN
        return self.workspace

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}, CUDA: {self.library.kore_cuda_message().decode()}")


def _pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _matrix(tensor):
    return None if tensor is None else ctypes.byref(Matrix(tensor.data_ptr(), *tensor.shape, *tensor.stride()))


def _code(tensor) -> int:
    return {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}[str(tensor.dtype)]


def _stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
