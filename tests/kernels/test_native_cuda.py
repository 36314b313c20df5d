"""The compiled kernels for GPUs, without one: which calls reach them, and with what arguments.

A stand-in for the compiled module reads its arguments from memory as csrc/kore.h describes them, insists on what the
kernels demand, and computes in float64.
"""

from __future__ import annotations

import ctypes
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kore_kernels as kk
from kore_kernels import cuda, dispatch, extension
from kore_kernels.covariance_update import reference
from kore_kernels.covariance_update.configs import MOST_ROWS

from .conftest import INTERPRETER
from .numbers import LAYOUTS, assert_accurate, bits, laid_out

if INTERPRETER:
    pytest.skip("nothing of Triton", allow_module_level=True)

DTYPES = {1: torch.bfloat16, 2: torch.float16}
WORKSPACE, STREAM = 48, 77
GPU = torch.device("cuda", 0)


def memory(address: int, shape: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix at ``address``."""
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
    storage = (ctypes.c_uint8 * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(storage, dtype=dtype).as_strided(shape, stride)


def rows_copyable(matrix: tuple) -> bool:
    address, _rows, columns, stride_row, stride_column = matrix
    return stride_column == 1 and stride_row >= columns and (address | 2 * stride_row) % 16 == 0


def columns_copyable(matrix: tuple) -> bool:
    address, rows, columns, stride_row, stride_column = matrix
    return rows_copyable((address, columns, rows, stride_column, stride_row))


class StandIn:
    """What the compiled module has for GPUs."""

    CUDA_ARCHS = "80 90a"
    CUDA_VERSION = 13000

    def __init__(self):
        self.calls: list[str] = []
        self.rows: list[int] = []

    def cuda_missing(self) -> str:
        return ""

    def cuda_covariance_workspace(self, n, d):
        return WORKSPACE

    def cuda_two_products_workspace(self, out, L, P):
        assert out[1] == L[1] and (P is None or P[1] == L[1])
        return WORKSPACE

    def _check(self, workspace, workspace_bytes, stream):
        assert memory(workspace, (1, WORKSPACE), (WORKSPACE, 1), torch.uint8).numel() <= workspace_bytes
        assert stream == STREAM

    def cuda_covariance_update(self, C, d, x, n, stride_row, dtype, alpha, factor, upper, space, size, stream):
        self._check(space, size, stream)
        assert rows_copyable((x, n, d, stride_row, 1))
        self.calls.append("covariance")
        self.rows.append(n)
        scale = alpha * (memory(factor, (1, 1), (1, 1), torch.float32).item() if factor else 1.0)
        rows = memory(x, (n, d), (stride_row, 1), DTYPES[dtype]).double()
        update = scale * (rows.T @ rows)
        memory(C, (d, d), (d, 1), torch.float32).add_(update.triu() if upper else update.tril())

    def cuda_two_products(self, out, L, R, bias, P, Q, scaling, add, dtype, space, size, stream):
        self._check(space, size, stream)
        self.calls.append("products")
        assert (P is None) == (Q is None) and bias % 4 == 0
        assert rows_copyable(out) and (add is None or rows_copyable(add))
        for factors in ((L, P), (R, Q)):
            given = [each for each in factors if each is not None]
            assert all(map(rows_copyable, given)) or all(map(columns_copyable, given))
        assert not (columns_copyable(L) and columns_copyable(R))

        def read(matrix):
            return memory(matrix[0], matrix[1:3], matrix[3:], DTYPES[dtype]).double()

        def product(left, right):
            left, right = read(left), read(right)
            assert not left[:, len(right) :].any()
            return left[:, : len(right)] @ right

        columns = R[2]
        total = product(L, R) if P is not None else scaling * product(L, R)
        if P is not None:
            total += scaling * product(P, Q)
        if bias:
            total += memory(bias, (1, columns), (columns, 1), DTYPES[dtype])[0].double()
        if add is not None:
            total += read(add)
        result = memory(out[0], out[1:3], out[3:], DTYPES[dtype])
        result[:, :columns] = total.to(result.dtype)
        result[:, columns:] = 0


@pytest.fixture
def module(monkeypatch):
    """The stand-in, on a machine whose GPU is an H100."""
    stand_in = StandIn()
    monkeypatch.setattr(extension, "_load", lambda: (stand_in, None))
    monkeypatch.setattr(cuda, "_stream", lambda tensor: STREAM)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("KORE_BACKEND", raising=False)
    for cached in (cuda.absence, dispatch._select):
        cached.cache_clear()
    yield stand_in
    for cached in (cuda.absence, dispatch._select):
        cached.cache_clear()


@pytest.fixture
def native(module, monkeypatch):
    """Every operation goes to the files for GPUs, on CPU tensors."""
    monkeypatch.setattr(dispatch, "select", lambda op, *rest: importlib.import_module(f"kore_kernels.{op}.cuda"))
    return module


def expected_covariance(C, x, mask, alpha, triangle):
    exact = C.double()
    reference.covariance_update(exact, x.double(), mask, None, float(alpha), triangle)
    return exact


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 7), (333, 100), (MOST_ROWS + 1, 16), (2 * MOST_ROWS, 24)])
def test_covariance(native, n, d, dtype):
    for triangle, alpha in (("lower", 0.5), ("upper", torch.tensor(-2.0, dtype=torch.float64))):
        x, C = torch.randn(n, d).to(dtype), torch.randn(d, d)
        exact = expected_covariance(C, x, None, alpha, triangle)
        kk.covariance_update_(C, x, alpha=alpha, triangle=triangle)
        torch.testing.assert_close(C.double(), exact, rtol=1e-5, atol=1e-3)
    assert sum(native.rows) == 2 * n and max(native.rows) <= MOST_ROWS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_covariance_of_every_layout_and_with_a_mask(native, layout):
    x = laid_out(torch.randn(45, 20).bfloat16(), layout)
    mask = torch.rand(x.shape[:-1]) > 0.4
    if layout != "expanded":
        x[~mask] = torch.nan
    C, kept = torch.zeros(20, 20), torch.where(mask[..., None], x, 0.0).reshape(-1, 20)
    kk.covariance_update_(C, x, mask=mask)
    torch.testing.assert_close(C.double(), (kept.double().T @ kept.double()).tril(), rtol=1e-5, atol=1e-4)
    assert native.calls == ["covariance"]


def test_covariances_that_are_passed_on(native):
    x, C = torch.randn(9, 5), torch.zeros(5, 5)
    for rows, weight, start in (
        (x, None, C),
        (x.bfloat16(), torch.ones(9), C),
        (x.bfloat16(), None, C.double()),
    ):
        updated = kk.covariance_update_(start.clone(), rows, weight=weight)
        torch.testing.assert_close(updated, (rows.T.to(C.dtype) @ rows.to(C.dtype)).tril().to(start.dtype))
    kk.covariance_update_(C, x[:0].bfloat16())
    kk.symmetrize_(C)
    assert not native.calls


def linear(n, d_in, d_out, r, dtype, layout="contiguous"):
    x = laid_out(torch.randn(n, d_in).to(dtype), layout)
    W, b = (torch.randn(d_out, d_in) / d_in**0.5).to(dtype), torch.randn(d_out).to(dtype)
    A, B = (torch.randn(r, d_in) / d_in**0.5).to(dtype), torch.randn(d_out, r).to(dtype)
    return x, W, b, A, B


def outputs(function, x, Bs, gs):
    """Every y, dx, every dB."""
    x, Bs = x.detach().requires_grad_(), [B.detach().requires_grad_() for B in Bs]
    ys = function(x, Bs)
    torch.autograd.backward(ys, gs)
    return [*(y.detach() for y in ys), x.grad, *(B.grad for B in Bs)]


def compare(native, monkeypatch, function, arguments, gs, reduction):
    """``function(cast)`` gives a function of (x, Bs); the calls of the stand-in that it takes."""
    x, Bs = arguments
    ours = outputs(function(lambda t: t), x, Bs, gs)
    calls = len(native.calls)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "select", lambda op, *rest: importlib.import_module(f"kore_kernels.{op}.reference"))
        plain = outputs(function(lambda t: t), x, Bs, gs)
        wide = outputs(function(lambda t: t.double()), x.double(), [B.double() for B in Bs], [g.double() for g in gs])
    assert all(y.is_contiguous() for y in ours[: len(gs)])
    for got, same_dtype, exact in zip(ours, plain, wide, strict=True):
        assert_accurate(got, same_dtype, exact, reduction)
    return calls


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "r"), [(1, 1, 1, 1), (33, 40, 24, 16), (70, 65, 51, 7), (129, 96, 130, 235)]
)
@pytest.mark.parametrize("merged", [False, True])
def test_linear(native, monkeypatch, n, d_in, d_out, r, dtype, merged):
    x, W, b, A, B = linear(n, d_in, d_out, r, dtype)
    gs = [torch.randn(n, d_out).to(dtype)]

    def function(cast):
        return lambda x, Bs: [kk.lora_fa_linear(x, cast(W), cast(b), cast(A), Bs[0], 0.7, merged=merged)]

    assert compare(native, monkeypatch, function, (x, [B]), gs, d_in + d_out + n) == (6 if merged else 5)


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "leading"])
def test_linear_of_every_layout(native, monkeypatch, layout):
    x, W, _, A, B = linear(40, 48, 32, 12, torch.bfloat16, layout)
    W, A, B = (laid_out(t, "expanded" if layout == "expanded" else layout) for t in (W, A, B))
    gs = [laid_out(torch.randn(40, 32).bfloat16(), layout)]

    def function(cast):
        return lambda x, Bs: [kk.lora_fa_linear(x, cast(W), None, cast(A), Bs[0])]

    assert compare(native, monkeypatch, function, (x, [B]), gs, 120) == 5


def test_linears_that_are_passed_on(native, monkeypatch):
    monkeypatch.setattr(extension, "refusal", lambda: "the stand-in has nothing for CPUs")
    x, W, b, A, B = linear(12, 16, 8, 4, torch.bfloat16)
    kk.lora_fa_linear(x, W, b, A, B, dropout_p=0.5)
    kk.lora_fa_linear(x, W, b, A.float(), B.float())
    kk.lora_fa_linear(x.float(), W.float(), b.float(), A.float(), B.float(), merged=True)
    assert kk.lora_fa_linear(x[:0], W, b, A, B).shape == (0, 8)
    assert not native.calls


@pytest.mark.parametrize(("n", "d_in", "widths", "r"), [(50, 40, (24, 51, 8), 20), (9, 13, (5,), 3)])
def test_a_group(native, monkeypatch, n, d_in, widths, r):
    x, *_ = linear(n, d_in, 1, 1, torch.bfloat16)
    U = (torch.randn(d_in, r) / d_in**0.5).bfloat16()
    Rs = [(torch.randn(r, r) / r**0.5).bfloat16() for _ in widths]
    Ws = [(torch.randn(width, d_in) / d_in**0.5).bfloat16() for width in widths]
    bs = [torch.randn(width).bfloat16() if i else None for i, width in enumerate(widths)]
    Bs, gs = ([torch.randn(rows, width).T.bfloat16() for width in widths] for rows in (r, n))
    gs = [g.T.contiguous() for g in gs]

    def function(cast):
        def call(x, Bs):
            biases = [None if b is None else cast(b) for b in bs]
            return kk.lora_fa_linears(x, [cast(W) for W in Ws], biases, cast(U), [cast(R) for R in Rs], Bs, 0.7)

        return call

    layers = len(widths)
    assert compare(native, monkeypatch, function, (x, Bs), gs, 200) == 1 + 2 * layers + 4 * layers + 1


class TestRouting:
    def test_native_on_a_gpu_is_opt_in(self, module, monkeypatch):
        assert dispatch._preference("covariance_update", GPU, torch.float32)[0] != "native"
        monkeypatch.setenv("KORE_BACKEND", "native")
        for op in dispatch.OPERATIONS:
            assert dispatch.select(op, GPU, torch.float32).__name__ == f"kore_kernels.{op}.cuda"
            on_cpu = dispatch.select(op, torch.device("cpu"), torch.float32).__name__
            assert on_cpu.endswith(".native" if op in dispatch.COMPILED_FOR_CPUS else ".products")

    def test_auto_takes_it_where_it_is_proven(self, module, monkeypatch):
        monkeypatch.setitem(dispatch.PROVEN_ON_GPU["native"], "covariance_update", ((9, 0),))
        assert dispatch._preference("covariance_update", GPU, torch.float32)[0] == "native"
        assert dispatch._preference("lora_fa_linear", GPU, torch.float32)[0] == "torch"

    @pytest.mark.parametrize(
        ("archs", "capability", "reason"),
        [
            ("80 90a", (7, 5), "compiled for sm_80, sm_90a .*the GPU is sm_75"),
            ("90a", (8, 0), "compiled for sm_90a .*the GPU is sm_80"),
            ("90a", (10, 0), "the GPU is sm_100"),
            ("90a", (9, 0), None),
            ("80", (9, 0), None),
            ("80", (12, 0), None),
        ],
    )
    def test_the_device_decides(self, module, monkeypatch, archs, capability, reason):
        monkeypatch.setattr(StandIn, "CUDA_ARCHS", archs)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setenv("KORE_BACKEND", "native")
        if reason is None:
            assert dispatch.select("symmetrize", GPU, torch.float32)
            return
        with pytest.raises(RuntimeError, match=f"KORE_BACKEND=native cannot run symmetrize on cuda:0 .*{reason}"):
            dispatch.select("symmetrize", GPU, torch.float32)

    @pytest.mark.parametrize(
        ("loaded", "reason"),
        [
            ((SimpleNamespace(), None), "compiled without CUDA kernels; KORE_BUILD=cuda"),
            ((SimpleNamespace(CUDA_ARCHS="80", cuda_missing=lambda: "no driver"), None), "no GPU .*: no driver"),
            ((None, "not compiled"), r"no compiled kernels \(not compiled\)"),
        ],
    )
    def test_what_is_missing(self, module, monkeypatch, loaded, reason):
        monkeypatch.setattr(extension, "_load", lambda: loaded)
        monkeypatch.setenv("KORE_BACKEND", "native")
        with pytest.raises(RuntimeError, match=f"cannot run lora_fa_linear on cuda:0 .*{reason}"):
            dispatch.select("lora_fa_linear", GPU, torch.bfloat16)

    def test_other_devices(self, module):
        assert "NVIDIA" in dispatch._refusal("native", torch.device("meta"), torch.float32)


def test_the_compiled_module_without_a_gpu():
    """The real one, where it has CUDA kernels and the machine has no driver."""
    if not cuda.architectures():
        pytest.skip("the installation has no CUDA kernels")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    module = extension._module()
    assert module.cuda_missing() and module.cuda_covariance_workspace(100, 100) == 0
    x, C = torch.ones(8, 8).bfloat16(), torch.zeros(8, 8)
    with pytest.raises((RuntimeError, ValueError)):
        module.cuda_covariance_update(C.data_ptr(), 8, x.data_ptr(), 8, 8, 1, 1.0, 0, False, 0, 0, 0)
    matrix = (x.data_ptr(), 8, 8, 8, 1)
    with pytest.raises((RuntimeError, ValueError)):
        module.cuda_two_products(matrix, matrix, matrix, 0, None, None, 1.0, None, 1, 0, 0, 0)
    assert not C.any() and bits(x).eq(bits(torch.ones(8, 8).bfloat16())).all()
    assert cuda.absence() in kk.backends()["native"].detail
