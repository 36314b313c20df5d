"""covariance_update_ and symmetrize_ as they run without compiled kernels: BLAS, or torch products block by block."""

from __future__ import annotations

import pytest
import torch

import kore_kernels as kk
from kore_kernels import blas, extension
from kore_kernels.covariance_update import products
from kore_kernels.symmetrize import products as symmetrize
from kore_kernels.symmetrize.configs import CPU_BLOCK

from .numbers import LAYOUTS, bits, laid_out
from .test_covariance_update import check, start


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch):
    monkeypatch.setenv("KORE_BACKEND", "native")
    monkeypatch.setattr(extension, "refusal", lambda: "left out by the test")


@pytest.fixture
def _no_scipy(monkeypatch):
    monkeypatch.setattr(blas, "_routine", lambda dtype: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
def test_numbers(dtype, triangle):
    x, mask, weight = torch.randn(700, 300).to(dtype), torch.rand(700) > 0.5, torch.randn(700)
    check(start(300, triangle=triangle), x, triangle=triangle)
    x[~mask] = torch.nan
    for options in ({"mask": mask}, {"mask": mask, "weight": weight, "alpha": -0.3}):
        check(start(300, triangle=triangle), x, triangle=triangle, **options)


@pytest.mark.usefixtures("_no_scipy")
def test_without_scipy():
    for layout in LAYOUTS:
        check(start(530), laid_out(torch.randn(60, 530), layout))
    check(start(530, triangle="upper"), torch.randn(60, 530), triangle="upper")
    check(start(33), torch.randn(90, 33).bfloat16(), weight=torch.randn(90), mask=torch.rand(90) > 0.5)
    assert "not available" in kk.backends()["native"].detail


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_kept_rows_that_are_not_finite_propagate(bad, alpha):
    x, C = torch.randn(40, 35), torch.zeros(35, 35)
    x[7, 34] = bad
    kk.covariance_update_(C, x, alpha=alpha)
    assert not C[34].isfinite().any() and C[:34].isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_chunks(monkeypatch, weighted):
    monkeypatch.setattr(products, "LEAST_ROWS", 7)
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(products, "BLOCK", 8)
    weight = torch.randn(50) if weighted else None
    check(start(19), torch.randn(50, 19).bfloat16(), weight=weight)
    check(start(19), torch.randn(50, 19), weight=weight, mask=torch.rand(50) > 0.3)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns", "rows"])
def test_blas_reads_strided_rows_where_they_lie(layout):
    assert blas.can_syrk(torch.zeros(7, 7), laid_out(torch.randn(9, 7), layout)) == blas.available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scipy", [True, False])
def test_no_temporary_of_the_size_of_C(request, dtype, scipy):
    if not scipy:
        request.getfixturevalue("_no_scipy")
    d, largest = 1536, 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func._schema.is_mutable and out.untyped_storage() is not None:
                inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
                if out.untyped_storage().data_ptr() not in inputs:
                    largest = max(largest, out.numel())
            return out

    C, x = torch.zeros(d, d), torch.randn(40, d).to(dtype)
    with Sizes():
        products.covariance_update(C, x, None, None, 1.0, "lower")
    assert largest <= max(x.numel(), products.BLOCK * d)


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setenv("KORE_BACKEND", "torch")
    monkeypatch.setattr(products, "_update_on_cpu", products._update_on_gpu)
    monkeypatch.setattr(products, "GPU_BLOCK", 128)
    monkeypatch.setattr(products, "GPU_CHUNK_ELEMENTS", 1)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
def test_numbers_as_on_a_gpu(dtype, triangle):
    x, mask, weight = torch.randn(700, 300).to(dtype), torch.rand(700) > 0.5, torch.randn(700)
    check(start(300, triangle=triangle), x, triangle=triangle)
    x[~mask], weight[~mask] = torch.nan, torch.inf
    for options in ({"mask": mask}, {"mask": mask, "weight": weight, "alpha": torch.tensor(-0.3)}):
        check(start(300, triangle=triangle), x, triangle=triangle, **options)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_kept_rows_that_are_not_finite_propagate_as_on_a_gpu(alpha):
    x, C = torch.randn(40, 35), torch.zeros(35, 35)
    x[7, 34] = torch.nan
    kk.covariance_update_(C, x, alpha=alpha)
    assert not C[34].isfinite().any() and C[:34].isfinite().all()


def test_a_gpu_is_not_waited_for():
    """Nothing asks for a value or for a shape that depends on one, as fake tensors have none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, C = torch.randn(700, 300).bfloat16(), torch.zeros(300, 300)
        products._update_on_gpu(C, x, torch.rand(700) > 0.5, torch.randn(700), torch.tensor(0.5), "lower")
        symmetrize.symmetrize(C, "lower")


@pytest.mark.skipif(not blas.available() or blas._openblas() is None, reason="needs SciPy's OpenBLAS")
def test_blas_runs_with_torchs_threads_and_gets_its_own_back():
    get, _ = blas._openblas()
    before = get()
    for count in (1, 2):
        with blas._threads(count):
            assert get() == count
    assert get() == before


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, CPU_BLOCK, CPU_BLOCK + 1, 3 * CPU_BLOCK - 1])
def test_symmetrize(d, dtype, triangle):
    C = torch.randn(d, d, dtype=dtype)
    expected = C.tril() + C.tril(-1).T if triangle == "lower" else C.triu() + C.triu(1).T
    symmetrize.symmetrize(C, triangle)
    assert torch.equal(bits(C), bits(expected))
