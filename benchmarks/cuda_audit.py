"""Static audit of csrc/cuda: compile every kernel for its GPUs, without one; about three CPU minutes.

    python -m benchmarks.cuda_audit [--only REGEX]

Exits non-zero when a kernel spills registers, or lacks the instructions that it is written for: tensor cores, and loads
that run ahead of them. Without nvcc it says so and checks nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# Of each generation: its target, and what its kernels that multiply are made of (HMMA: mma.sync, LDGSTS: cp.async,
# LDSM: ldmatrix; HGMMA: wgmma, UTMALDG: loads by the copy engine).
GENERATIONS = {
    "ampere": ("80", ("HMMA", "LDGSTS", "LDSM")),
    "hopper": ("90a", ("HGMMA", "UTMALDG")),
}
MULTIPLIES = ("covariance_kernel", "two_products_kernel")


@dataclass(frozen=True)
class Row:
    """One compiled kernel and what the compiler made of it."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    instructions: dict[str, int]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        counts = " ".join(f"{name}x{count}" for name, count in self.instructions.items()) or "-"
        problems = "".join(f"  ** {problem}" for problem in self.problems)
        return f"{self.arch:>4} {self.registers:>4} {self.spill_bytes:>5}  {counts}; {self.kernel}{problems}"


def audit(source: Path, nvcc: str, tools: Path) -> list[Row]:
    """Every kernel of one source."""
    arch, wanted = GENERATIONS[source.stem.partition("_")[0]]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        subprocess.run([nvcc, target, "-O3", "-std=c++17", "-cubin", source, "-o", cubin], check=True)
        usage = _tool(tools / "cuobjdump", "-res-usage", cubin)
        code = dict(
            re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", _tool(tools / "nvdisasm", cubin), re.M | re.S)
        )
    return [
        _row(name, arch, int(registers), int(stack) + int(local), code[name], wanted)
        for name, registers, stack, local in re.findall(
            r"Function (\S+?):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage
        )
    ]


def _row(name: str, arch: str, registers: int, spill_bytes: int, code: str, wanted: tuple[str, ...]) -> Row:
    instructions = dict(Counter(re.findall(rf"\b({'|'.join(wanted)})\b", code)))
    problems = [f"spills {spill_bytes} bytes"] if spill_bytes else []
    if any(kernel in name for kernel in MULTIPLIES):
        problems += [f"no {instruction}" for instruction in wanted if instruction not in instructions]
    return Row(name, arch, registers, spill_bytes, instructions, tuple(problems))


def _tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression: the sources to audit")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("skipped: csrc/cuda is compiled by nvcc, which is not in PATH")
        return 0
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    rows = []
    print(f"{'sm':>4} {'regs':>4} {'spill':>5}  instructions; kernel")
    for source in sorted(SOURCES.glob("*.cu")):
        if "__global__" in source.read_text() and re.search(options.only, source.stem):
            found = audit(source, nvcc, tools)
            rows += found
            print(*found, sep="\n", flush=True)
    failed = sum(bool(row.problems) for row in rows)
    print(f"{len(rows)} kernels, {failed} with problems")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
