"""Build script: metadata is in pyproject.toml; here CMake compiles the kernels (csrc/). Nothing imports torch.

``KORE_BUILD`` says what is compiled:

* ``auto`` (the default): the CPU kernels where that succeeds, else nothing. Never the CUDA kernels, even beside nvcc:
  they take minutes, and a wheel with them has a version of its own (``0.1.0+cu130``).
* ``none``: nothing; a pure-Python package that works without them.
* ``cpu``: the CPU kernels, or the build fails.
* ``cuda``: those and the CUDA kernels, for the architectures of ``KORE_CUDA_ARCHS`` ("80;90a;100a") that have any.

``MAX_JOBS`` limits how many compilers run at a time.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = os.environ.get("KORE_BUILD") or "auto"
JOBS = os.environ.get("MAX_JOBS") or ""
if BUILD not in ("auto", "none", "cpu", "cuda"):
    raise SystemExit(f"KORE_BUILD must be auto, none, cpu or cuda, got {BUILD!r}")
if JOBS and not re.fullmatch("[1-9][0-9]*", JOBS):
    raise SystemExit(f"MAX_JOBS must be a number of compilers, 1 or more, got {JOBS!r}")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"]
    found = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    if found is None:
        raise SystemExit(
            "KORE_BUILD=cuda needs nvcc 12.5 or newer, and it is neither in CUDACXX, CUDA_HOME nor PATH; "
            "install the CUDA toolkit, name it there, or build with KORE_BUILD=cpu"
        )
    return found


def cuda_tag(nvcc: str) -> str:
    """cu130 for CUDA 13.0."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise SystemExit(f"{nvcc} --version should name a release, got {said!r}; KORE_BUILD=cuda needs another nvcc")
    return "cu{}{}".format(*release.groups())


class CMakeBuild(build_ext):
    """The extension is one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._cmake(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if BUILD != "auto":
                kernels = {"cpu": "CPU kernels", "cuda": "CPU and CUDA kernels"}[BUILD]
                raise SystemExit(f"KORE_BUILD={BUILD}, but the {kernels} did not compile: {error}") from error
            self.warn(f"installing without compiled CPU kernels, which did not compile: {error}")
            self.extensions = self.distribution.ext_modules = []

    def _cmake(self, output: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(
            missing_ok=True
        )  # it remembers the build tools of an environment that is gone
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "KORE_PYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if BUILD == "cuda":
            options |= {"KORE_CUDA": "ON", "CMAKE_CUDA_COMPILER": NVCC}
            if os.environ.get("KORE_CUDA_ARCHS"):
                options["KORE_CUDA_ARCHS"] = os.environ["KORE_CUDA_ARCHS"]
        defined = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *defined], check=True)
        subprocess.run(["cmake", "--build", build, *(["--parallel", JOBS] if JOBS else [])], check=True)


class Wheel(bdist_wheel):
    """A wheel for one Python version and platform if something was compiled, for all of them otherwise."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


NVCC = find_nvcc() if BUILD == "cuda" and "sdist" not in sys.argv else None
setup(
    ext_modules=[] if BUILD == "none" else [Extension("kore_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    options={"egg_info": {"tag_build": f"+{cuda_tag(NVCC)}"}} if NVCC else {},
)
