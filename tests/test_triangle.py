"""Half matrices: pairs in one buffer, and rows in a file."""

from __future__ import annotations

import pytest
import torch

from kore.triangle import HALVES, Triangle, unpack


def symmetric(d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    full = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return full.tril() + full.tril(-1).mT


@pytest.mark.parametrize("d", [1, 2, 7, 33])
@pytest.mark.parametrize("block", [1, 40, 1 << 22])
def test_two_matrices_fill_one_buffer_and_leave_each_other_alone(d, block, monkeypatch):
    monkeypatch.setattr("kore.triangle._BLOCK", block)
    first, second = symmetric(d, 1), symmetric(d, 2)
    buffer = torch.full((d + 1, d), float("nan"))
    lower, upper = Triangle(buffer[1:], "lower"), Triangle(buffer[:d], "upper")
    lower.assign(first)
    upper.assign(second)
    assert not buffer.isnan().any()
    assert torch.equal(lower.full(), first) and torch.equal(upper.full(), second)
    lower.assign(second.double())
    assert torch.equal(lower.full(), second) and torch.equal(upper.full(), second)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("d", [0, 1, 2, 7, 33])
def test_packed_and_back(d, half):
    full = symmetric(d, dtype=torch.float64)
    packed = Triangle(full, half).packed()
    assert packed.shape == (d * (d + 1) // 2,)
    assert torch.equal(unpack(packed, d, half), full)
