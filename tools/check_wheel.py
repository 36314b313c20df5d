"""Checks wheels as a packager would, without building anything: python tools/check_wheel.py WHEEL... [--install]

Each wheel: its name agrees with what is inside, nothing is there that should not be; a compiled one exports one symbol,
links to neither torch nor CUDA, and needs no newer C library than its tag promises. ``--install`` also installs each
into an empty environment and runs ``python -m kore_kernels`` there, outside the source tree.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LARGEST = {"none": 6, "cpu": 8, "cuda": 40}  # MiB; the demo's data and model take 4
# What a Linux system has; OpenMP's library comes along in a wheel for any system (auditwheel repair).
SYSTEM = r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux-[\w-]+)\.so(\.\d+)?"
OPENMP = r"lib(gomp|omp)(-\w+)?\.so(\.[\d.]+)?"


class Wheel:
    """A wheel's file name, taken apart, and its contents in a folder."""

    def __init__(self, path: Path, folder: Path):
        self.path = path
        self.version, self.python, self.abi, self.platform = path.name.removesuffix(".whl").split("-")[1:]
        with zipfile.ZipFile(path) as archive:
            self.names = archive.namelist()
            self.times = {info.date_time for info in archive.infolist()}
            archive.extractall(folder)
        self.modules = sorted(folder.glob("kore_kernels/_native*"))
        self.libraries = sorted(folder.glob("*.libs/*"))
        self.metadata = next(folder.glob("*.dist-info/WHEEL")).read_text(encoding="utf-8")

    @property
    def kind(self) -> str:
        return "none" if self.platform == "any" else "cuda" if "+cu" in self.version else "cpu"


def problems(wheel: Wheel) -> list[str]:
    return [*_contents(wheel), *(problem for module in wheel.modules for problem in _module(wheel, module))]


def _contents(wheel: Wheel) -> list[str]:
    found = []
    strange = [
        name for name in wheel.names if not re.match(r"(kore|kore_kernels|kore_lmm-[^/]+|kore_lmm\.libs)/", name)
    ]
    if strange:
        found.append(f"expected kore and kore_kernels only, got {', '.join(strange)}")
    if any(name.endswith((".pyc", ".cpp", ".cu")) for name in wheel.names):
        found.append("expected neither sources nor byte code of the compiled kernels")
    if len(wheel.modules) != (wheel.kind != "none"):
        names = [module.name for module in wheel.modules]
        found.append(f"a wheel of kind {wheel.kind} has {len(names)} compiled modules ({names}); build it again")
    if wheel.kind == "none" and (wheel.python, wheel.abi) != ("py3", "none"):
        found.append(f"expected py3-none-any of a pure wheel, got {wheel.python}-{wheel.abi}-{wheel.platform}")
    for tag in (f"{wheel.python}-{wheel.abi}-{part}" for part in wheel.platform.split(".")):
        if f"Tag: {tag}" not in wheel.metadata.splitlines():
            found.append(f"the name says {tag}, the file WHEEL does not")
    size = wheel.path.stat().st_size / 2**20
    if size > LARGEST[wheel.kind]:
        found.append(f"{size:.1f} MiB, at most {LARGEST[wheel.kind]} expected of kind {wheel.kind}")
    return found


def _module(wheel: Wheel, module: Path) -> list[str]:
    found = []
    exported = re.findall(r"\w+$", _run("nm", "-D", "--defined-only", str(module)), re.M)
    if exported != ["PyInit__native"]:
        found.append(f"expected the one exported symbol PyInit__native, got {exported}")
    needed = re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", str(module)))
    bundled = {library.name for library in wheel.libraries}
    for name in needed:
        if name in bundled or re.fullmatch(SYSTEM, name):
            continue
        if re.fullmatch(OPENMP, name) and wheel.platform.startswith("linux_"):
            continue  # a wheel for this machine
        hint = "auditwheel repair brings it along" if re.fullmatch(OPENMP, name) else "nothing else may be linked"
        found.append(f"links to {name}: {hint}")
    promised = re.search(r"manylinux_(\d+)_(\d+)", wheel.platform)
    if promised:
        newest = max((glibc(file) for file in (module, *wheel.libraries)), default=(0, 0))
        if newest > (int(promised[1]), int(promised[2])):
            found.append(f"needs glibc {newest[0]}.{newest[1]}, its tag {wheel.platform} promises less")
    if wheel.kind == "cuda" and b"libcuda.so.1" not in module.read_bytes():
        found.append("has +cu in its version, but no CUDA runtime inside")
    return found


def glibc(file: Path) -> tuple[int, int]:
    """The newest version of the C library whose symbols a shared object uses."""
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", _run("objdump", "-T", str(file)))
    return max(((int(major), int(minor)) for major, minor in versions), default=(0, 0))


def self_test(wheel: Wheel, folder: Path, packages: str | None) -> list[str]:
    """In an environment that has this wheel and, from ``packages`` or by pip, torch; nothing of the source tree."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    if packages:
        site = next(environment.glob("lib/python*/site-packages"))
        (site / "packages.pth").write_text(f"{Path(packages).resolve()}\n", encoding="utf-8")
    dependencies = ["--no-deps"] if packages else []
    _run(str(python), "-m", "pip", "install", "-q", *dependencies, str(wheel.path))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KORE_"))}
    where = "import kore_kernels; print(kore_kernels.__file__)"
    lies = _run(str(python), "-c", where, cwd=folder, env=clean).strip()
    if not lies.startswith(str(environment)):
        return [f"expected the installed package, got {lies}"]
    run = subprocess.run([python, "-m", "kore_kernels"], cwd=folder, env=clean, capture_output=True, text=True)
    print(re.sub("(?m)^", "    ", run.stdout.rstrip()))
    compiled = "no compiled kernels" not in run.stdout
    found = [] if run.returncode == 0 else [f"python -m kore_kernels ended with {run.returncode}: {run.stderr}"]
    if compiled != (wheel.kind != "none"):
        found.append(f"a wheel of kind {wheel.kind}, but compiled kernels are {'' if compiled else 'not '}there")
    return found


def _run(*command: str, **options: object) -> str:
    run = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {run.returncode}: {run.stderr}")
    return str(run.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--install", action="store_true", help="install each and run its self-test")
    parser.add_argument("--packages", help="a site-packages folder with torch; without it, pip brings the dependencies")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.wheels:
        with tempfile.TemporaryDirectory() as temporary:
            wheel = Wheel(path.resolve(), Path(temporary, "wheel"))
            print(f"{path.name}: {wheel.kind}, {path.stat().st_size / 1e6:.2f} MB", flush=True)
            found = problems(wheel)
            if arguments.install:
                found += self_test(wheel, Path(temporary), arguments.packages)
        print("".join(f"  wrong: {problem}\n" for problem in found) or "  right")
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
