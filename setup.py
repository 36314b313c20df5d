"""Build script: metadata is in pyproject.toml; here CMake compiles the CPU kernels (csrc/). Nothing imports torch.

``KORE_BUILD`` says what is compiled: ``cpu`` the CPU kernels, or the build fails; ``none`` nothing, a pure-Python
package that works without them; ``auto`` (the default) the CPU kernels where that succeeds.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = os.environ.get("KORE_BUILD", "auto")
if BUILD not in ("auto", "none", "cpu"):
    raise SystemExit(f"KORE_BUILD must be auto, none or cpu, got {BUILD!r}")


class CMakeBuild(build_ext):
    """The extension is one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._cmake(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if BUILD == "cpu":
                raise SystemExit(f"KORE_BUILD=cpu, but the CPU kernels did not compile: {error}") from error
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
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defined = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *defined], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


class Wheel(bdist_wheel):
    """A wheel for one Python version and platform if something was compiled, for all of them otherwise."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[] if BUILD == "none" else [Extension("kore_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
