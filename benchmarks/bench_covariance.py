"""covariance_update_ beside its peers, and symmetrize_, on this machine's CPU.

pytest benchmarks/bench_covariance.py --benchmark-only --benchmark-group-by=group

pytest-benchmark times one contender after the other. `kore bench covariance` and benchmarks/cpu_suite.py take turns.
"""

from __future__ import annotations

import pytest
import torch

import kore_kernels as kk
from kore.bench.covariance import relative_error
from kore.bench.peers import PEERS

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
RUNNING = [(peer, dtype) for dtype in DTYPES for peer in PEERS if peer.refusal(CPU, dtype) is None]


@pytest.mark.parametrize("n", [600, 2048])
@pytest.mark.parametrize("d", [1024])
@pytest.mark.parametrize(("peer", "dtype"), RUNNING, ids=lambda value: getattr(value, "name", str(value)))
def test_covariance(benchmark, peer, dtype, d, n):
    torch.manual_seed(0)
    x, C = torch.randn(n, d).to(dtype), torch.zeros(d, d)
    step = peer.prepare(C, x)
    narrow = dtype == torch.bfloat16 and peer.name not in ("covariance_update_", "C.addmm_(x.T, x)")
    assert relative_error(C, x, peer, step) < (2e-2 if narrow else 1e-6)
    C.zero_()
    benchmark.group = f"covariance {dtype} d={d} n={n}"
    benchmark(step)


def test_symmetrize(benchmark):
    benchmark(kk.symmetrize_, torch.randn(1024, 1024))
