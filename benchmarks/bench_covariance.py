"""covariance_update_ beside what it replaces, on this machine's CPU.

pytest benchmarks/bench_covariance.py --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

import pytest
import torch

import kore_kernels as kk


def _plain(C, x):
    C += x.T @ x


def _addmm(C, x):
    C.addmm_(x.T, x)


def _addmm_cast(C, x):
    rows = x.float()
    C.addmm_(rows.T, rows)


CONTENDERS = {
    "covariance_update_": (kk.covariance_update_, (torch.float32, torch.bfloat16)),
    "C += x.T @ x": (_plain, (torch.float32,)),
    "C.addmm_(x.T, x)": (_addmm, (torch.float32,)),
    "C.addmm_ after x.float()": (_addmm_cast, (torch.bfloat16,)),
}


@pytest.mark.parametrize("n", [600, 2048])
@pytest.mark.parametrize("d", [1024])
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, (_, dtypes) in CONTENDERS.items() for dtype in dtypes]
)
def test_covariance(benchmark, name, dtype, d, n):
    torch.manual_seed(0)
    x, C = torch.randn(n, d).to(dtype), torch.zeros(d, d)
    exact = x.double().T @ x.double()
    function = CONTENDERS[name][0]
    function(C, x)
    torch.testing.assert_close(C.tril().double(), exact.tril(), rtol=1e-4, atol=1e-3)
    benchmark.group = f"covariance {dtype} d={d} n={n}"
    benchmark(function, C, x)


def test_symmetrize(benchmark):
    benchmark(kk.symmetrize_, torch.randn(1024, 1024))
