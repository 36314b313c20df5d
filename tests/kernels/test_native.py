"""The compiled CPU kernels: every instruction set of this machine, error, threads, memory and what is exported."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import kore_kernels as kk
from kore_kernels import extension
from kore_kernels.lora_fa_linear import dropout

from .conftest import INTERPRETER
from .numbers import LAYOUTS, bits, laid_out
from .test_covariance_update import check, half, start
from .test_lora_fa_linear import layer, run

if INTERPRETER or extension.refusal():
    pytest.skip(extension.refusal() or "nothing of Triton", allow_module_level=True)

LEVELS = extension.ISAS[: extension.isa() + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    monkeypatch.setenv("KORE_BACKEND", "native")


@pytest.fixture(params=LEVELS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("KORE_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 31), (193, 33), (5, 97), (900, 230)])
def test_shapes(isa, n, d, dtype):
    x = torch.randn(n, d).to(dtype)
    for triangle in ("lower", "upper"):
        check(start(d, triangle=triangle), x, triangle=triangle, alpha=-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_masks_and_weights(isa, layout, dtype):
    x = laid_out(torch.randn(201, 70).to(dtype), layout)
    check(start(70), x)
    mask, weight = torch.rand(x.shape[:-1]) > 0.5, torch.randn(x.shape[:-1])
    check(start(70), x, mask=mask)
    check(start(70, triangle="upper"), x, mask=mask, weight=weight, triangle="upper")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(isa, dtype):
    """A kept NaN or inf reaches its row and column of C; an excluded one nothing, nor does a column beyond x's last."""
    x, mask = torch.randn(70, 50).to(dtype), torch.ones(70, dtype=torch.bool)
    x[3], mask[3] = torch.nan, False
    x[69, 49], x[10, 20] = torch.inf, torch.nan
    C = kk.covariance_update_(torch.zeros(50, 50), x, mask=mask)
    expected = torch.zeros(50, 50, dtype=torch.bool)
    expected[[20, 49]] = True
    expected[:, [20, 49]] = True
    assert torch.equal(~C.isfinite(), expected.tril())


def test_float16_of_every_exponent(isa):
    """Normal, subnormal, zero, infinite: each is what torch makes of it."""
    x = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16).reshape(-1, 64)
    ones = torch.ones(len(x), 1, dtype=torch.float16)
    rows = torch.cat([x, ones], dim=1)
    for i in torch.randperm(len(x))[:60].tolist():
        C = kk.covariance_update_(torch.zeros(65, 65), rows[i : i + 1])
        assert torch.equal(bits(C[64, :64].nan_to_num(7.0)), bits((x[i].float() + 0.0).nan_to_num(7.0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(600, 235), (2048, 17), (2048, 1000), (20_000, 17), (20_000, 235)])
def test_error_is_at_most_twice_that_of_addmm(isa, n, d, dtype):
    """Sums of two-byte numbers stay exact for long, so this bound is what keeps the sums in registers short."""
    x = torch.randn(n, d).to(dtype)
    exact = x.double().T @ x.double()
    error, plain = (
        (C.double() - exact).tril().abs().max().item()
        for C in (
            kk.covariance_update_(torch.zeros(d, d), x),
            torch.zeros(d, d).addmm_(x.float().T, x.float()),
        )
    )
    assert error <= 2 * plain + 2**-24 * exact.abs().max().item()


def test_large(threads):
    """d = 4096 with a mask, weights and a stride, against a part of C in float64."""
    threads(2)
    x = torch.randn(300, 2 * 4096).bfloat16()[:, ::2]
    mask, weight = torch.rand(300) > 0.2, torch.randn(300)
    C = torch.full((4096, 4096), torch.nan).triu(1)
    kk.covariance_update_(C, x, mask=mask, weight=weight)
    kept = x[mask].double()
    rows = torch.tensor([0, 31, 95, 96, 2000, 4095])
    exact = (kept * weight[mask].double()[:, None])[:, rows].T @ kept
    for row, values in zip(rows.tolist(), exact):
        torch.testing.assert_close(C[row, : row + 1].double(), values[: row + 1], rtol=1e-5, atol=1e-4)
        assert C[row, row + 1 :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(isa, threads, dtype):
    x, mask, weight = torch.randn(1000, 250).to(dtype), torch.rand(1000) > 0.1, torch.randn(1000)
    results = []
    for count in (1, 2, 5):
        threads(count)
        C = kk.covariance_update_(torch.zeros(250, 250), x, mask=mask)
        results.append(kk.covariance_update_(C, x, weight=weight))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_calls_from_several_threads():
    inputs = [torch.randn(400, 100 + 30 * i) for i in range(4)]
    outputs = [torch.zeros(x.shape[1], x.shape[1]) for x in inputs]
    workers = [threading.Thread(target=kk.covariance_update_, args=pair) for pair in zip(outputs, inputs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for C, x in zip(outputs, inputs):
        torch.testing.assert_close(C, half(x.T @ x, "lower"), rtol=1e-5, atol=1e-3)


class TestDropout:
    """The compiled mask is the definition's, for every instruction set, element size and stride."""

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("layout", LAYOUTS[:-1])
    def test_same_bits(self, isa, layout, dtype):
        x, seed, out = (
            laid_out(torch.randn(23, 531).to(dtype), layout),
            -(2**62) + 12345,
            torch.empty(23, 531).to(dtype),
        )
        extension.dropout(x, seed, dropout.threshold(0.3), 1000, out, extension.isa())
        assert torch.equal(out, dropout.drop(x, 0.3, torch.tensor([seed]), 1000))

    def test_in_place_and_whatever_the_number_of_threads(self, isa, threads):
        x = torch.full((300, 257), torch.nan)
        kept = dropout.keep(torch.tensor([3]), 0.5, 0, *x.shape)
        for count in (1, 2, 5):
            threads(count)
            y = x.clone()
            extension.dropout(y, 3, dropout.threshold(0.5), 0, y, extension.isa())
            assert torch.equal(y.isnan(), kept)

    def test_the_layer_without_compiled_kernels(self, monkeypatch):
        arguments, options = layer(700, 65, 50, 23), {"dropout_p": 0.3, "seed": torch.tensor([4])}
        ours = run(lambda *a: kk.lora_fa_linear(*a, **options), *arguments, 0.7, torch.ones(700, 50))
        monkeypatch.setattr(extension, "refusal", lambda: "for this test")
        monkeypatch.setattr(extension, "dropout", None)
        without = run(lambda *a: kk.lora_fa_linear(*a, **options), *arguments, 0.7, torch.ones(700, 50))
        for first, second in zip(ours, without):
            assert torch.equal(first, second)

    def test_the_library_refuses_what_it_has_no_code_for(self):
        x = torch.ones(2, 2)
        for elements, threshold, level, message in (
            (x, -1, 0, "out of range"),
            (x, 2**31, 0, "out of range"),
            (x.to(torch.int8), 1, 0, "out of range"),
            (x, 1, extension._module().cpu_isa() + 1, "instruction set"),
        ):
            with pytest.raises(ValueError, match=message):
                extension.dropout(elements, 0, threshold, 0, elements, level)


class TestInstructionSet:
    def test_the_best_of_this_machine_passes_its_own_check(self):
        assert extension._best() == extension._module().cpu_isa()

    def test_unknown(self, monkeypatch):
        monkeypatch.setenv("KORE_CPU_ISA", "sse9")
        with pytest.raises(ValueError, match=r"KORE_CPU_ISA must be portable, .*got 'sse9'"):
            kk.covariance_update_(torch.zeros(2, 2), torch.ones(1, 2))
        assert "sse9" in kk.backends()["native"].detail

    def test_beyond_this_machine(self, monkeypatch):
        monkeypatch.setattr(extension, "_best", lambda: 1)
        monkeypatch.setenv("KORE_CPU_ISA", "avx512")
        with pytest.raises(RuntimeError, match=r"KORE_CPU_ISA=avx512 cannot run here: .* avx2"):
            extension.isa()

    def test_the_library_refuses_what_the_processor_lacks(self):
        C, x = torch.zeros(2, 2), torch.ones(1, 2)
        with pytest.raises(ValueError, match="instruction set"):
            extension.covariance_update(C, x, None, None, 1.0, "lower", extension._module().cpu_isa() + 1)
        assert not C.any()

    def test_backends_names_it(self, isa):
        assert f"compiled kernels ({isa};" in kk.backends()["native"].detail

    def test_a_level_with_wrong_numbers_is_not_used(self, monkeypatch, caplog):
        module = extension._module()

        class Broken:
            cpu_isa = staticmethod(lambda: 4)

            @staticmethod
            def covariance_update(C, d, *rest):
                *arguments, level, threads = rest
                module.covariance_update(C, d, *arguments, 0, threads)
                if level > 2:
                    ctypes.c_float.from_address(C + 4 * d).value += 1.0

            @staticmethod
            def dropout(*arguments):
                *arguments, _level, threads = arguments
                module.dropout(*arguments, 0, threads)

        monkeypatch.setattr(extension, "_load", lambda: (Broken, None))
        with caplog.at_level(logging.WARNING, logger="kore_kernels"):
            assert extension._best.__wrapped__() == 2
        assert [r.message.split()[4] for r in caplog.records] == ["amx_bf16", "avx512_bf16"]


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (SimpleNamespace(ABI_VERSION=-1), "compiled for interface -1, this package has .*install the package again"),
        (ModuleNotFoundError("No module named 'kore_kernels._native'"), "not compiled in this installation"),
        (ImportError("libgomp.so.1: cannot open"), "does not load: libgomp.so.1"),
    ],
)
def test_why_there_are_no_compiled_kernels(monkeypatch, fake, reason):
    def load(name):
        if isinstance(fake, Exception):
            raise fake
        return fake

    monkeypatch.setattr(extension.importlib, "import_module", load)
    monkeypatch.setattr(extension, "_load", extension._load.__wrapped__)
    with pytest.raises(RuntimeError, match=reason):
        extension._module()
    C = kk.covariance_update_(torch.zeros(3, 3), torch.ones(2, 3))
    assert torch.equal(C, torch.full((3, 3), 2.0).tril())
    assert "no compiled kernels" in kk.backends()["native"].detail


def test_only_the_entry_point_is_exported():
    library = ctypes.CDLL(extension._module().__file__)
    assert hasattr(library, "PyInit__native")
    assert not hasattr(library, "kore_covariance_update") and not hasattr(library, "kore_message")


PROCESS = """
import re, resource, torch, kore_kernels as kk
from pathlib import Path
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kk.covariance_update_(torch.ones(8, 8), torch.ones(9, 8))
for dtype in (torch.bfloat16, torch.float32):
    x, C = torch.randn(600, 4096).to(dtype), torch.ones(4096, 4096)
    before = peak()
    kk.covariance_update_(C, x)
    print(peak() - before, x.nbytes)
print(*set(re.findall(r"/\\S*lib[gi]?omp\\S*", Path("/proc/self/maps").read_text())))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extra_memory_and_one_thread_pool():
    """8 MiB and a small multiple of x, where C has 64 MiB; and the OpenMP that torch has loaded, not another one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True)
    *memory, libraries = run.stdout.splitlines()
    for line in memory:
        extra, x_bytes = map(int, line.split())
        assert extra <= 8 * 2**20 + x_bytes
    assert len(memory) == 2 and len(libraries.split()) == 1
