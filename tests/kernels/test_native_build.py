"""Installing where the CPU kernels do not compile: KORE_BUILD decides between a pure-Python wheel and an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import INTERPRETER

if INTERPRETER:
    pytest.skip("nothing of Triton", allow_module_level=True)
pytest.importorskip("setuptools", minversion="77", reason="builds wheels")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """What a build reads, and of the packages only the kernels."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "cmake"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(
        ROOT / "kore_kernels", folder / "kore_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return folder


def build(sources: Path, setting: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", f"dist-{setting}"],
        cwd=sources,
        env={**os.environ, "KORE_BUILD": setting, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# An editable installation of the repository would lend its compiled module.
USE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import kore_kernels as kk, torch
C = kk.covariance_update_(torch.zeros(3, 3), torch.ones(2, 3).bfloat16())
assert torch.equal(kk.symmetrize_(C), torch.full((3, 3), 2.0))
print(kk.__file__, kk.backends()["native"].detail)
"""


def test_auto_without_a_compiler_gives_a_package_that_works(sources, tmp_path):
    run = build(sources, "auto", CXX="/no/compiler")
    assert run.returncode == 0, run.stderr
    assert "installing without compiled CPU kernels" in run.stderr
    (wheel,) = (sources / "dist-auto").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert str(tmp_path) in output and "no compiled kernels (not compiled in this installation)" in output


def test_cpu_without_a_compiler_fails_and_says_why(sources):
    run = build(sources, "cpu", CXX="/no/compiler")
    assert run.returncode != 0
    assert "KORE_BUILD=cpu, but the CPU kernels did not compile" in run.stderr


def test_none_compiles_nothing(sources):
    run = build(sources, "none", PATH="")
    assert run.returncode == 0, run.stderr
    (wheel,) = (sources / "dist-none").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_unknown_setting(sources):
    run = build(sources, "gpu")
    assert run.returncode != 0 and "KORE_BUILD must be auto, none, cpu or cuda, got 'gpu'" in run.stderr


def test_cuda_without_nvcc_fails_and_says_why(sources):
    run = build(sources, "cuda", PATH="", CUDACXX="", CUDA_HOME="", CUDA_PATH="")
    assert run.returncode != 0
    assert "KORE_BUILD=cuda needs" in run.stderr and "nvcc" in run.stderr
    assert "or build with KORE_BUILD=cpu" in run.stderr


def test_auto_beside_nvcc_compiles_no_cuda(sources, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.9\n")
    nvcc.chmod(0o755)
    run = build(sources, "auto", CUDACXX=str(nvcc), CXX="/no/compiler")
    assert run.returncode == 0, run.stderr
    assert "+cu" not in "".join(wheel.name for wheel in (sources / "dist-auto").iterdir())


@pytest.mark.parametrize("jobs", ["0", "many", "-1"])
def test_max_jobs_is_a_number(sources, jobs):
    run = build(sources, "none", MAX_JOBS=jobs)
    assert run.returncode != 0 and f"MAX_JOBS must be a number of compilers, 1 or more, got {jobs!r}" in run.stderr
