"""tools/check_wheel.py finds what is wrong with a wheel, and nothing in a good one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools import check_wheel

from .wheels import make_wheel

LINUX = "cp311-cp311-linux_x86_64"
MODULE = "kore_kernels/_native.cpython-311-x86_64-linux-gnu.so"
ENTRY = 'extern "C" __attribute__((visibility("default"))) void %s() {}\n'


def problems(wheel: Path, tmp_path: Path) -> str:
    return "\n".join(check_wheel.problems(check_wheel.Wheel(wheel, tmp_path / "unpacked")))


@pytest.fixture
def compiled(tmp_path):
    """Compiles C++ into the bytes of a shared object."""
    compiler = shutil.which("g++")
    if compiler is None or not all(shutil.which(tool) for tool in ("nm", "readelf", "objdump")):
        pytest.skip("no compiler or no binutils")

    def compile(source: str, *options: str) -> bytes:
        (tmp_path / "module.cpp").write_text(source)
        command = [compiler, "-shared", "-fPIC", "-nostdlib", "module.cpp", "-o", "module.so", *options]
        subprocess.run(command, cwd=tmp_path, check=True)
        return (tmp_path / "module.so").read_bytes()

    return compile


def test_a_good_pure_wheel(tmp_path):
    assert problems(make_wheel(tmp_path), tmp_path) == ""


def test_a_good_compiled_wheel(tmp_path, compiled):
    wheel = make_wheel(tmp_path, LINUX, **{MODULE: compiled(ENTRY % "PyInit__native")})
    assert problems(wheel, tmp_path) == ""


def test_a_second_symbol(tmp_path, compiled):
    source = ENTRY % "PyInit__native" + ENTRY % "kore_symmetrize"
    wheel = make_wheel(tmp_path, LINUX, **{MODULE: compiled(source)})
    assert "expected the one exported symbol PyInit__native, got" in problems(wheel, tmp_path)


@pytest.mark.parametrize("library", ["libtorch.so", "libcudart.so.13", "libcuda.so.1"])
def test_a_library_that_is_not_there_everywhere(tmp_path, compiled, library):
    (tmp_path / library).write_bytes(compiled("", f"-Wl,-soname,{library}"))
    module = compiled(ENTRY % "PyInit__native", "-Wl,--no-as-needed", str(tmp_path / library))
    wheel = make_wheel(tmp_path, LINUX, **{MODULE: module})
    assert f"links to {library}: nothing else may be linked" in problems(wheel, tmp_path)


def test_openmp_must_come_along_where_the_wheel_is_for_any_linux(tmp_path, compiled):
    (tmp_path / "libgomp.so.1").write_bytes(compiled("", "-Wl,-soname,libgomp.so.1"))
    module = compiled(ENTRY % "PyInit__native", "-Wl,--no-as-needed", str(tmp_path / "libgomp.so.1"))
    here = make_wheel(tmp_path, LINUX, **{MODULE: module})
    assert problems(here, tmp_path) == ""
    anywhere = make_wheel(tmp_path, "cp311-cp311-manylinux_2_28_x86_64", **{MODULE: module})
    assert "auditwheel repair brings it along" in problems(anywhere, tmp_path / "second")


def test_a_tag_that_promises_too_old_a_c_library(tmp_path, compiled):
    wheel = make_wheel(tmp_path, "cp311-cp311-manylinux_2_17_x86_64", **{MODULE: compiled(ENTRY % "PyInit__native")})
    opened = check_wheel.Wheel(wheel, tmp_path / "unpacked")
    assert check_wheel.problems(opened) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_wheel, "glibc", lambda file: (2, 34))
        (problem,) = check_wheel.problems(opened)
    assert "needs glibc 2.34, its tag manylinux_2_17_x86_64 promises less" in problem


def test_a_pure_wheel_with_a_compiled_module(tmp_path, compiled):
    wheel = make_wheel(tmp_path, **{MODULE: compiled(ENTRY % "PyInit__native")})
    assert "a wheel of kind none has 1 compiled modules" in problems(wheel, tmp_path)


def test_a_compiled_wheel_without_its_module(tmp_path):
    assert "a wheel of kind cpu has 0 compiled modules" in problems(make_wheel(tmp_path, LINUX), tmp_path)


def test_a_cuda_wheel_without_cuda(tmp_path, compiled):
    module = {MODULE: compiled(ENTRY % "PyInit__native")}
    wheel = make_wheel(tmp_path, LINUX, "0.1.0+cu130", **module)
    assert "no CUDA runtime inside" in problems(wheel, tmp_path)


def test_strangers_and_a_name_that_is_not_its_own(tmp_path):
    wheel = make_wheel(tmp_path, **{"tests/test_x.py": b""})
    renamed = wheel.rename(tmp_path / "kore_lmm-0.1.0-cp311-none-any.whl")
    found = problems(renamed, tmp_path)
    assert "expected kore and kore_kernels only, got tests/test_x.py" in found
    assert "the name says cp311-none-any, the file WHEEL does not" in found
