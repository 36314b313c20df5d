"""KORE_BACKEND, the choice of auto, and what backends() says about it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import kore_kernels as kk
from kore_kernels import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("KORE_BACKEND", raising=False)
    dispatch._select.cache_clear()


def test_setting_is_read_at_each_call(monkeypatch):
    names = []
    for setting in ("native", "reference", "torch", "auto", ""):
        monkeypatch.setenv("KORE_BACKEND", setting)
        names.append(dispatch.select("symmetrize", CPU, torch.float32).__name__.rsplit(".", 1)[1])
    assert names == ["native", "reference", "products", "native", "native"]


def test_unknown_setting(monkeypatch):
    monkeypatch.setenv("KORE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"KORE_BACKEND must be auto, .*got 'fast'"):
        kk.symmetrize_(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "reason"),
    [
        ("triton", "cpu", torch.float32, "TRITON_INTERPRET=1|not installed"),
        ("triton", "cuda", torch.float64, "float64 has no Triton kernel|not installed"),
        ("native", "cuda", torch.float32, "compiled without CUDA|no compiled kernels|no GPU can be used|without CUDA"),
        ("native", "meta", torch.float32, "CPUs and NVIDIA GPUs"),
    ],
)
def test_a_forced_backend_that_cannot_run_raises_with_the_reason(monkeypatch, setting, device, dtype, reason):
    monkeypatch.setenv("KORE_BACKEND", setting)
    with pytest.raises(RuntimeError, match=f"KORE_BACKEND={setting} cannot run covariance_update .*({reason})"):
        dispatch.select("covariance_update", torch.device(device), dtype)


def test_a_forced_backend_that_cannot_run_leaves_C(monkeypatch):
    monkeypatch.setenv("KORE_BACKEND", "triton")
    C = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        kk.covariance_update_(C, torch.ones(2, 3))
    assert not C.any()


def test_auto_logs_its_choice_once(caplog):
    with caplog.at_level(logging.INFO, logger="kore_kernels"):
        for _ in range(3):
            kk.symmetrize_(torch.zeros(2, 2))
    (record,) = [r for r in caplog.records if "symmetrize" in r.message]
    assert "native backend" in record.message and "CPU" in record.message


@pytest.mark.parametrize(("proven", "expected"), [((), "torch"), (((9, 0),), "triton"), (((8, 0),), "torch")])
def test_auto_on_a_gpu_uses_triton_only_where_it_is_proven(monkeypatch, proven, expected):
    monkeypatch.setitem(dispatch.PROVEN_ON_GPU["triton"], "symmetrize", proven)
    monkeypatch.setattr(dispatch, "_refusal", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    name, reason = dispatch._preference("symmetrize", torch.device("cuda", 0), torch.float32)
    assert name == expected
    assert "GPU suite" in reason


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_where_nothing_is_proven_pytorch_multiplies(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for op in dispatch.OPERATIONS:
        backend = dispatch.select(op, torch.device(device), torch.bfloat16)
        assert backend.__name__ == f"kore_kernels.{op}.products"


def test_backends_says_what_can_run_and_why_not():
    rows = kk.backends()
    assert list(rows) == ["native", "triton", "torch", "reference"]
    assert all(rows[name].available for name in ("native", "torch", "reference"))
    assert "covariance_update on cpu" in rows["native"].default_for
    if not torch.cuda.is_available():
        assert not rows["triton"].available
        assert "not available" in str(rows["triton"]) and rows["triton"].detail


def test_import_loads_neither_triton_nor_scipy():
    code = "import sys, kore_kernels; sys.exit(any(m.split('.')[0] in ('triton', 'scipy') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
