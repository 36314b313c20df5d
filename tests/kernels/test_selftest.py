"""``python -m kore_kernels``: it tells what runs here, and notices a backend whose numbers are wrong."""

from __future__ import annotations

import os

import pytest
import torch

from kore_kernels import __main__, dispatch, doctor, extension, selftest
from kore_kernels.covariance_update import native

from .conftest import INTERPRETER

if INTERPRETER:
    pytest.skip("the interpreter takes minutes", allow_module_level=True)


@pytest.fixture(scope="module")
def results():
    return selftest.run()


def test_what_runs_here_is_right(results):
    assert [str(result) for result in results if not result.passed] == []


def test_every_operation_runs_on_every_backend_and_instruction_set(results):
    names = {result.backend for result in results}
    expected = {"reference"}
    if extension.refusal():
        expected.add("native")
    else:
        expected |= {f"native ({level})" for level in extension.ISAS[: extension.isa() + 1]}
    assert expected <= names
    for name in names:
        operations = {result.operation for result in results if result.backend == name}
        assert operations == set(dispatch.OPERATIONS)


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("KORE_BACKEND", "reference")
    monkeypatch.delenv("KORE_CPU_ISA", raising=False)
    state = torch.get_rng_state()
    case = next(selftest._cases())
    selftest._attempt(case[0], {"KORE_BACKEND": "native", "KORE_CPU_ISA": "portable"}, *case[2:])
    assert os.environ["KORE_BACKEND"] == "reference" and "KORE_CPU_ISA" not in os.environ
    assert torch.equal(torch.get_rng_state(), state)


def wrong(C, x, *arguments):
    C[3, 2] += 0.1
    C[2, 3] += 0.1


def failing(C, x, *arguments):
    raise OSError("no such driver")


@pytest.mark.parametrize(
    ("broken", "told"), [(wrong, "covariance_update in float32: error"), (failing, "no such driver")]
)
def test_a_wrong_backend_ends_with_status_1(monkeypatch, capsys, broken, told):
    monkeypatch.setattr(native, "covariance_update", broken)
    assert __main__.main() == 1
    output = capsys.readouterr().out
    (line,) = (line for line in output.splitlines() if line.startswith("not to be trusted here"))
    assert "native" in line and "reference" not in line
    assert told in output


def test_a_module_of_another_interface_is_named(monkeypatch):
    reason = "the compiled module was compiled for interface 1, this package has 2; install the package again"
    monkeypatch.setattr(extension, "_load", lambda: (None, reason))
    rows = {finding.name: finding for finding in doctor.examine(verify=False)}
    assert reason in rows["native CUDA"].detail and reason in rows["native"].detail


class CudaModule:
    CUDA_VERSION, CUDA_ARCHS = 13000, "90a"

    def __init__(self, missing: str, driver: int):
        self.cuda_missing = lambda: missing
        self.cuda_driver = lambda: driver


@pytest.mark.parametrize(
    ("missing", "driver", "state", "told"),
    [
        ("CUDA driver version is insufficient", 0, "note", "no NVIDIA driver is installed"),
        ("CUDA driver version is insufficient", 12040, "note", "the driver has CUDA 12.4"),
        ("", 13000, "ok", "compiled for sm_90a with CUDA 13.0"),
    ],
)
def test_what_keeps_the_cuda_kernels_from_running(monkeypatch, missing, driver, state, told):
    monkeypatch.setattr(extension, "refusal", lambda: None)
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: CudaModule(missing, driver))
    finding = doctor._cuda()
    assert finding.state == state and told in finding.detail and missing in finding.detail
