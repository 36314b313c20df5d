"""The sanitizers section of the GPU suite, with a stand-in for compute-sanitizer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_sanitizers
from benchmarks.gpu_suite import Suite
from benchmarks.native.subjects import FAMILIES
from kore.bench.timing import Clock

STAND_IN = """#!/bin/sh
echo "$KORE_CUDA_KERNELS $*" >> {log}
{body}
"""
CLEAN = """case "$*" in
*racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
*) echo "========= ERROR SUMMARY: 0 errors";;
esac"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    made = Suite(torch.device("cuda", 0), True, tmp_path / "gpu.json", time.monotonic() + 60, Clock(cpu))
    made.deadline = made.end
    monkeypatch.setattr(gpu_sanitizers, "build", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return made


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    program, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    program.write_text(STAND_IN.format(log=log, body=body))
    program.chmod(0o755)
    monkeypatch.setattr(gpu_sanitizers, "sanitizer", lambda: str(program))
    return log


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (10, 0)])
def test_every_tool_checks_every_kind_of_kernel_that_the_gpu_runs(tmp_path, monkeypatch, suite, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    log = stand_in(tmp_path, monkeypatch, CLEAN)
    found = gpu_sanitizers.section(suite)
    kinds = ("triton", "hopper", "ampere") if capability == (9, 0) else ("triton", "ampere")
    assert set(found) == {f"{tool}, {kind}" for tool in gpu_sanitizers.TOOLS for kind in kinds}
    assert all(result["errors"] == 0 for result in found.values()) and suite.wrong == suite.missed == []
    lines = log.read_text().splitlines()
    checks = [line for line in lines if f"benchmarks.native.checks {' '.join(FAMILIES)} --library release" in line]
    assert len(lines) == len(found) and len(checks) == len(found) - 3
    assert sum(line.startswith("sm80 ") for line in lines) == 3 and all("--small" in line for line in checks)


def test_what_a_tool_finds_and_what_a_program_finds_is_wrong(tmp_path, monkeypatch, suite):
    body = f"""case "$*" in
*memcheck*gpu_suite*) echo "Invalid __global__ write"; echo "========= ERROR SUMMARY: 3 errors"; exit 9;;
*synccheck*checks*) echo "FAIL forward"; echo "========= ERROR SUMMARY: 0 errors"; exit 1;;
esac
{CLEAN}"""
    stand_in(tmp_path, monkeypatch, body)
    found = gpu_sanitizers.section(suite)
    assert found["memcheck, triton"]["errors"] == 3 and found["synccheck, hopper"]["errors"] == 0
    wrong = sorted(line.split(":")[0] for line in suite.wrong)
    assert wrong == ["memcheck, triton", "synccheck, ampere", "synccheck, hopper"] and suite.missed == []
    assert "Invalid __global__ write" in next(line for line in suite.wrong if "memcheck" in line)


def test_a_tool_that_does_not_work_or_does_not_end_is_not_a_clean_run(tmp_path, monkeypatch, suite):
    body = f"""case "$*" in
*memcheck*) echo "========= Error: Device not supported"; exit 1;;
*racecheck*) exec sleep 30;;
esac
{CLEAN}"""
    stand_in(tmp_path, monkeypatch, body)
    suite.deadline = time.monotonic() + 2
    found = gpu_sanitizers.section(suite)
    assert suite.wrong == [] and {name for name, result in found.items() if result} <= {
        f"synccheck, {kind}" for kind in ("triton", "hopper", "ampere")
    }
    assert sum("Device not supported" in line for line in suite.missed) >= 1
    assert sum("no end in time" in line for line in suite.missed) >= 3


def test_what_is_missing_is_said(monkeypatch, suite):
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_sanitizers.section(suite) == {}
    assert "CUDA toolkit" in suite.missed[0] and len(suite.missed) == 1


def test_without_nvcc_triton_is_still_checked(tmp_path, monkeypatch, suite):
    def refused():
        raise RuntimeError("nvcc is not in PATH")

    monkeypatch.setattr(gpu_sanitizers, "build", refused)
    stand_in(tmp_path, monkeypatch, CLEAN)
    assert len(gpu_sanitizers.section(suite)) == 3 and suite.missed == ["sanitizers, CUDA kernels: nvcc is not in PATH"]
