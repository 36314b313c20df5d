"""symmetrize_: one triangle becomes the mirror of the other, which stays as it is, bit for bit."""

from __future__ import annotations

import pytest
import torch

import kore_kernels as kk
from kore_kernels.symmetrize.configs import CPU_BLOCK

from .conftest import INTERPRETER
from .numbers import bits

SIZES = [0, 1, 2, 31, 32, 33, 97, *([] if INTERPRETER else [CPU_BLOCK, CPU_BLOCK + 1, 3 * CPU_BLOCK - 1])]
DTYPES = [torch.float32] if INTERPRETER else [torch.float32, torch.float64]


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
def test_mirrors_a_triangle(backend, d, dtype, triangle):
    C = torch.randn(d, d, dtype=dtype)
    if d > 2:
        C[2, 0], C[2, 1], C[1, 0] = torch.nan, torch.inf, -0.0
        C[0, 2], C[1, 2], C[0, 1] = torch.nan, torch.inf, -0.0
    everywhere = torch.ones(d, d, dtype=torch.bool)
    kept = everywhere.tril() if triangle == "lower" else everywhere.triu()
    before = C.clone()
    C[~kept] = torch.nan
    assert kk.symmetrize_(C, triangle) is C
    assert torch.equal(bits(C), bits(torch.where(kept, before, before.T)))


def test_after_updates_the_sum_is_symmetric(backend):
    x = torch.randn(50, 40)
    C = kk.symmetrize_(kk.covariance_update_(torch.zeros(40, 40), x))
    torch.testing.assert_close(C, x.T @ x)


@pytest.mark.parametrize(
    ("C", "error", "message"),
    [
        (None, TypeError, "C must be a tensor"),
        (torch.zeros(3, 4), ValueError, "C must be a square matrix"),
        (torch.zeros(4, 4).bfloat16(), TypeError, "C must be float32 or float64, got bfloat16"),
        (torch.zeros(4, 8)[:, :4], ValueError, "C must be contiguous"),
    ],
)
def test_bad_input(C, error, message):
    with pytest.raises(error, match=f"symmetrize_: {message}"):
        kk.symmetrize_(C)


def test_unknown_triangle():
    with pytest.raises(ValueError, match="symmetrize_: triangle must be 'lower' or 'upper', got None"):
        kk.symmetrize_(torch.zeros(2, 2), None)


def test_opcheck():
    torch.library.opcheck(torch.ops.kore.symmetrize_.default, (torch.randn(5, 5), "lower"))
