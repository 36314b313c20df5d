"""Builds the CUDA kernels as plain libraries, build/native/*.so, with nvcc and nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "native"
BUILDS = {"debug": ["-DKORE_DEBUG_HANG"], "release": [], "registers": ["-DKORE_ADD_FROM_REGISTERS"]}
NVCC = "nvcc -O3 -std=c++17 -Xcompiler -fPIC -DKORE_HOPPER -DKORE_AMPERE"
# Machine code of 8.0 does not run on 9.0, so that the kernels of Ampere are compiled for both.
TARGETS = {
    "hopper": ["-gencode=arch=compute_90a,code=sm_90a"],
    "ampere": ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"],
}


def build() -> None:
    """Compiles everything unless it was compiled from exactly these sources.

    Raises:
        RuntimeError: nvcc is missing, or refuses something; its message.
    """
    if shutil.which("nvcc") is None:
        raise RuntimeError("nvcc is not in PATH; it comes with the CUDA toolkit")
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(SOURCES.iterdir()), ROOT / "csrc" / "kore.h"]
    stamp = BUILD / "sources.sha256"
    content = b"".join(path.read_bytes() for path in (*sources, Path(__file__)))
    digest = hashlib.sha256(content).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    stamp.unlink(missing_ok=True)
    commands: dict[Path, list[str]] = {}
    objects: dict[str, list[Path]] = {name: [] for name in BUILDS}
    for unit in (path for path in sources if path.suffix == ".cu"):
        generation = unit.stem.partition("_")[0]
        for name, defines in BUILDS.items():
            own = generation == "hopper"
            target = BUILD / (f"{unit.stem}-{name}.o" if own else f"{unit.stem}.o")
            objects[name].append(target)
            flags = [*TARGETS.get(generation, TARGETS["ampere"]), *(defines if own else [])]
            commands[target] = [*NVCC.split(), *flags, "-c", str(unit), "-o", str(target)]
    link = ["nvcc", "-shared", "-cudart", "static"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands.values()))
        list(pool.map(_run, ([*link, *map(str, o), "-o", f"{BUILD / name}.so"] for name, o in objects.items())))
    stamp.write_text(digest)
    print(f"built {', '.join(objects)}", flush=True)


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{ended.stdout}")
