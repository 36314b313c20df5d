"""Forward and backward of lora_fa_linear beside the unfused expression and the frozen layer alone, on the CPU.

pytest benchmarks/bench_lora.py --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kore_kernels as kk


def _unfused(x, weight, bias, A, B):
    return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B)


def _frozen(x, weight, bias, A, B):
    return F.linear(x, weight, bias)


TOKENS, RANK = 512, 235
CONTENDERS = {"lora_fa_linear": kk.lora_fa_linear, "unfused": _unfused, "frozen linear alone": _frozen}


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize(("d_in", "d_out"), [(1024, 1024), (1024, 2752)])
@pytest.mark.parametrize("name", CONTENDERS)
def test_forward_and_backward(benchmark, name, d_in, d_out, dtype):
    torch.manual_seed(0)
    n, r = TOKENS, RANK
    x = torch.randn(n, d_in, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(d_out, d_in, dtype=dtype), torch.randn(d_out, dtype=dtype)
    A, B = torch.randn(r, d_in, dtype=dtype), torch.randn(d_out, r, dtype=dtype, requires_grad=True)
    g = torch.randn(n, d_out, dtype=dtype)
    function = CONTENDERS[name]

    def step():
        x.grad = B.grad = None
        function(x, weight, bias, A, B).backward(g)

    if name != "frozen linear alone":
        torch.testing.assert_close(
            function(x, weight, bias, A, B), _unfused(x, weight, bias, A, B), rtol=1e-4, atol=1e-3
        )
    benchmark.group = f"forward + backward {dtype} {d_in} -> {d_out}, {n} tokens, rank {r}"
    benchmark(step)
