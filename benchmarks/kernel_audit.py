"""Static audit of the Triton kernels: compile every shipped configuration, without a GPU.

    python -m benchmarks.kernel_audit                 # every kernel for sm_80, sm_90 and sm_100
    python -m benchmarks.kernel_audit --arch 90 --json audit.json

The launching code of each backend runs as it would on a GPU, on meta tensors and with a pinned target; where a kernel
would be launched it is compiled. So what is audited is what runs. Exits non-zero when a kernel spills registers, needs
more shared memory than its architecture gives, holds no tensor-core instruction where it multiplies, or waits for the
loads that it should have in flight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ARCHITECTURES = (80, 90, 100)
TENSOR_CORE = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
ASYNCHRONOUS_LOAD = r"\b(cp\.async\.bulk\.tensor|cp\.async\.c[ag])"
MULTIPLIES_NOTHING = ("_symmetrize", "_add_parts")
LOADS_AHEAD = ("_covariance",)
REGISTERS_PER_SM, THREADS_PER_SM, BLOCKS_PER_SM = 65_536, 2_048, 32
SHARED_MEMORY_PER_SM = {80: 102_400, 90: 233_472, 100: 233_472}


@dataclass(frozen=True)
class Row:
    """One compiled kernel and what the compiler made of it."""

    case: str
    kernel: str
    arch: int
    registers: int
    spill_bytes: int
    shared_memory: int
    tensor_core: dict[str, int]
    loads: dict[str, int]
    blocks_per_sm: int
    occupancy: float
    problems: tuple[str, ...]


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call on meta tensors) for every kernel variant that is shipped."""
    from kore_kernels.covariance_update import triton as covariance
    from kore_kernels.lora_fa_linear import triton as lora
    from kore_kernels.lora_fa_linears import triton as group
    from kore_kernels.symmetrize import triton as symmetrize

    n, d = 2048, 4096
    C = _meta(d, d)
    mask, weight, alpha = _meta(n, dtype=torch.bool), _meta(n), _meta()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = _meta(n, d, dtype=dtype)
        for name, options in (
            ("", (None, None, 1.0, "lower")),
            (" upper", (None, None, alpha, "upper")),
            (" mask", (mask, None, alpha, "lower")),
            (" weight", (None, weight, 1.0, "lower")),
            (" mask weight", (mask, weight, 1.0, "upper")),
        ):
            yield f"covariance {_name(dtype)}{name}", lambda a=(C, x, *options): covariance.covariance_update(*a)
    small = (_meta(1000, 1000), _meta(n, 1000), None, None, 1.0, "lower")
    yield "covariance float32 small", lambda: covariance.covariance_update(*small)
    yield "symmetrize float32", lambda: symmetrize.symmetrize(C, "lower")
    yield "symmetrize float32 upper", lambda: symmetrize.symmetrize(C, "upper")
    for base, adapter in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ):
        r, d_out = 235, 11008
        x, g = _meta(n, d, dtype=base), _meta(n, d_out, dtype=base)
        W, b = _meta(d_out, d, dtype=base), _meta(d_out, dtype=base)
        A, B, h = _meta(r, d, dtype=adapter), _meta(d_out, r, dtype=adapter), _meta(n, 240, dtype=adapter)
        name = f"{_name(base)} with {_name(adapter)} adapter"
        yield f"lora forward {name}", lambda a=(x, W, b, A, B): lora.forward(*a, 1.0)
        yield f"lora backward {name}", lambda a=(g, W, A, B, h): lora.backward(*a, 1.0)
        seed = _meta(1, dtype=torch.int64)
        yield f"lora dropout forward {name}", lambda a=(x, W, b, A, B), seed=seed: lora.forward(*a, 1.0, 0.1, seed)
        yield f"lora dropout backward {name}", lambda a=(g, W, A, B, h), seed=seed: lora.backward(*a, 1.0, 0.1, seed)
        yield f"lora merged {name}", lambda a=(W, A, B): lora.merged(*a, 1.0)
        if (base, adapter) == (torch.bfloat16, torch.float32):
            yield "lora backward, x without gradient", lambda a=(g, None, None, B, h): lora.backward(*a, 1.0)
            yield "lora backward, B without gradient", lambda a=(g, W, A, B, None): lora.backward(*a, 1.0)
            U, Rs = _meta(d, r, dtype=adapter), [_meta(r, r, dtype=adapter)] * 2
            yield "group forward", lambda a=(x, [W] * 2, [b] * 2, U, Rs, [B] * 2): group.forward(*a, 1.0)
            yield "group backward", lambda a=([g] * 2, [W] * 2, U, Rs, [B] * 2, h): group.backward(*a, 1.0)


def architectures() -> tuple[int, ...]:
    """Those that the installed Triton can compile for: sm_100 came with 3.3."""
    return ARCHITECTURES if triton_version() >= (3, 3) else ARCHITECTURES[:2]


def triton_version() -> tuple[int, ...]:
    """(major, minor) of the one installed."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def audit(arch: int, only: str = "") -> list[Row]:
    """Every kernel that the cases launch on this architecture, each variant once."""
    rows: dict[str, Row] = {}
    for case, call in cases():
        if re.search(only, case):
            with compiled(arch) as kernels:
                call()
            for name, kernel in kernels:
                if kernel.hash not in rows:
                    rows[kernel.hash] = _inspect(case, name, arch, kernel)
    return list(rows.values())


@contextlib.contextmanager
def compiled(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a backend called on meta tensors compiles for ``arch`` what it would launch; yields (name, kernel)."""
    import triton

    from kore_kernels import gpu

    kernels: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
        kernels.append((kernel.__name__, kernel.warmup(*arguments, grid=grid, **options)))

    driver = triton.runtime.driver
    driver.set_active(_PinnedDriver(arch))
    try:
        with mock.patch.object(gpu, "_run", compile_only):
            yield kernels
    finally:
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            driver.reset_active()


class _PinnedDriver:
    """Stands in for a GPU: it names the target and has nothing to run on."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch, self.target = arch, GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0


def _inspect(case: str, name: str, arch: int, kernel: Any) -> Row:
    from kore_kernels import gpu

    registers, spill_bytes = _resources(kernel.asm["cubin"])
    shared_memory = kernel.metadata.shared
    tensor_core = dict(Counter(re.findall(TENSOR_CORE, kernel.asm["ptx"])))
    loads = dict(Counter(re.findall(ASYNCHRONOUS_LOAD, kernel.asm["ptx"])))
    threads = 32 * kernel.metadata.num_warps
    resident = min(
        BLOCKS_PER_SM,
        THREADS_PER_SM // threads,
        REGISTERS_PER_SM // ((max(registers, 1) + 7) // 8 * 8 * threads),  # handed out by eights
        SHARED_MEMORY_PER_SM[arch] // (shared_memory + 1024),
    )
    problems = []
    if spill_bytes:
        problems.append(f"spills {spill_bytes} bytes")
    if shared_memory > gpu.SHARED_MEMORY[arch]:
        problems.append(f"needs {shared_memory} bytes of shared memory, {gpu.SHARED_MEMORY[arch]} exist")
    if not tensor_core and name not in MULTIPLIES_NOTHING:
        problems.append("no tensor-core instruction")
    if not loads and name in LOADS_AHEAD and triton_version() >= (3, 4):  # older ones do not for every kind of tile
        problems.append("no asynchronous load")
    occupancy = resident * threads / THREADS_PER_SM
    return Row(
        case,
        name,
        arch,
        registers,
        spill_bytes,
        shared_memory,
        tensor_core,
        loads,
        resident,
        occupancy,
        tuple(problems),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack and local memory), read from the compiled code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--only", default="", help="regular expression: the cases to audit")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    rows = [row for arch in options.arch or architectures() for row in audit(arch, options.only)]
    print(f"{'sm':>4} {'kernel':<15} {'regs':>4} {'spill':>5} {'smem':>7} {'blocks':>6} {'occ':>4}  instructions; case")
    for row in rows:
        counts = " ".join(f"{name}x{count}" for name, count in {**row.tensor_core, **row.loads}.items()) or "-"
        print(
            f"{row.arch:>4} {row.kernel:<15} {row.registers:>4} {row.spill_bytes:>5} {row.shared_memory:>7} "
            f"{row.blocks_per_sm:>6} {row.occupancy:>4.0%}  {counts}; {row.case}"
            f"{''.join(f'  ** {problem}' for problem in row.problems)}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = sum(bool(row.problems) for row in rows)
    print(f"{len(rows)} kernels, {failed} with problems")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
